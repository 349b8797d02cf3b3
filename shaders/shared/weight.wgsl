{# Weights on their way from `softmax` to `values` and `export`: 0 for hidden keys, and for them alone, so that a key
   that weighs next to nothing still shows what its value is. #}
// The least weight of a visible key, and that of one whose logit is −∞: the least normal numbers, since subnormal ones
// may be flushed to 0.
const LEAST: f32 = 1.17549435082228750797e-38f; // 0x00800000
const NOTHING: f32 = 1.17549449095213056e-38f; // 0x00800001
// The weight of every visible key of a row without a finite result.
const NO_RESULT: f32 = -1.0;
