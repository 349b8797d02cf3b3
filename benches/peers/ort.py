"""Times ONNX Runtime's attention on its WebGPU provider, and checks it against float64 with the error budget of f32 arithmetic.

Reads one request a line, `fused 1,8,8,1024,1024,64c` or `unfused ...`, and answers each with one JSON object a line, until its input
ends; benches/peers/run talks to it. fused: MultiHeadAttention. unfused: MatMul, Softmax and MatMul.

Operands and results stay on the device. There is no other wait than to read the output back, so that is part of a sample.
"""

import json
import statistics
import sys
import time

import numpy
import onnxruntime
from onnx import TensorProto, helper

SECONDS = 1.0
LEAST, MOST = 5, 50
# Several short calls to a wait.
SECONDS_AT_ONCE, MOST_AT_ONCE = 0.02, 4
# Query rows that the error is taken over, at most.
ROWS_LOOKED_AT = 256
PROVIDER = "WebGpuExecutionProvider"


class Subject:
    def __init__(self, request):
        self.kernel, text = request.split(" ")
        self.causal = text.endswith("c")
        batch, heads, kv_heads, seq_q, seq_kv, dim = (int(size) for size in text.removesuffix("c").split(","))
        # Neither operator has grouped heads. The heads of a group count as query rows of their key/value head where that is the same
        # problem: best for the peer.
        if heads != kv_heads:
            if seq_q != 1 or self.causal:
                raise ValueError(f"{heads} heads with {kv_heads} key/value heads and {seq_q} queries: another problem")
            heads, seq_q = kv_heads, heads // kv_heads
        random = numpy.random.default_rng(2)
        shapes = [(batch, heads, rows, dim) for rows in (seq_q, seq_kv, seq_kv)]
        self.q, self.k, self.v = (random.standard_normal(shape, dtype=numpy.float32) for shape in shapes)

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Nothing runs on the CPU in silence.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        model, operands = (self.fused if self.kernel == "fused" else self.unfused)(batch, heads, seq_q, seq_kv, dim)
        start = time.perf_counter()
        self.session = onnxruntime.InferenceSession(model, options, providers=[PROVIDER], enable_fallback=0)
        loaded = time.perf_counter() - start
        self.binding = self.session.io_binding()
        self.resident = resident(operands, options)
        for name, value in self.resident.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_output("out", "webgpu", 0)
        self.first = loaded + self.sample(1)
        out = self.binding.get_outputs()[0].numpy()
        if self.kernel == "fused":
            out = out.reshape(batch, seq_q, heads, dim).transpose(0, 2, 1, 3)
        self.error, self.of_budget = self.judge(out)

    def fused(self, batch, heads, seq_q, seq_kv, dim):
        """q, k and v are [batch, seq, heads · dim]."""
        node = helper.make_node(
            "MultiHeadAttention", ["q", "k", "v"], ["out"], domain="com.microsoft", num_heads=heads, unidirectional=int(self.causal)
        )
        operands = {
            name: numpy.ascontiguousarray(x.transpose(0, 2, 1, 3).reshape(batch, x.shape[2], heads * dim))
            for name, x in [("q", self.q), ("k", self.k), ("v", self.v)]
        }
        return model([node], operands, [batch, seq_q, heads * dim]), operands

    def unfused(self, batch, heads, seq_q, seq_kv, dim):
        """Keys are given transposed and queries scaled, so that neither is timed."""
        operands = {"q": self.q * numpy.float32(dim**-0.5), "k": numpy.ascontiguousarray(self.k.transpose(0, 1, 3, 2)), "v": self.v}
        nodes = [helper.make_node("MatMul", ["q", "k"], ["scores"])]
        if self.causal:
            hidden = numpy.triu(numpy.full((seq_q, seq_kv), numpy.finfo(numpy.float32).min, numpy.float32), 1)
            operands["hidden"] = hidden[None, None]
            nodes.append(helper.make_node("Add", ["scores", "hidden"], ["masked"]))
        nodes.append(helper.make_node("Softmax", [nodes[-1].output[0]], ["weights"], axis=-1))
        nodes.append(helper.make_node("MatMul", ["weights", "v"], ["out"]))
        return model(nodes, operands, [batch, heads, seq_q, dim]), operands

    def sample(self, calls):
        """Seconds of one of so many calls."""
        start = time.perf_counter()
        for _ in range(calls):
            self.session.run_with_iobinding(self.binding)
        self.binding.get_outputs()[0].numpy()
        return (time.perf_counter() - start) / calls

    def judge(self, out):
        """The largest error, and the largest in proportion to the first-order error bound of f32 arithmetic; None: not finite."""
        batch, heads, seq_q, dim = self.q.shape
        seq_kv, unit = self.k.shape[2], 2.0**-24
        rows = numpy.unique(numpy.linspace(0, batch * heads * seq_q - 1, ROWS_LOOKED_AT).round().astype(int))
        worst_error, worst_share = 0.0, 0.0
        for flat in rows:
            b, h, i = flat // (heads * seq_q), flat // seq_q % heads, flat % seq_q
            seen = i + 1 if self.causal else seq_kv
            query, keys, values = (x.astype(numpy.float64) for x in (self.q[b, h, i], self.k[b, h, :seen], self.v[b, h, :seen]))
            scale = dim**-0.5
            logits = scale * (keys @ query)
            size = scale * (abs(keys) @ abs(query))
            weights = numpy.exp(logits - logits.max())
            weights /= weights.sum()
            want = weights @ values
            logit_error = unit * (4 * size + 2 * (4 + 2 * (logits.max() - logits)))
            budget = (weights * logit_error) @ abs(values - want)
            budget += (8 + seen**0.5) * unit * abs(values).max() + abs(want) * 4 * unit
            error = abs(out[b, h, i] - want)
            if not numpy.isfinite(out[b, h, i]).all():
                return None, None
            worst_error = max(worst_error, float(error.max()))
            worst_share = max(worst_share, float((error / budget).max()))
        return worst_error, worst_share

    def answer(self):
        calls = int(min(max(SECONDS_AT_ONCE / self.sample(1), 1), MOST_AT_ONCE))
        times, begin = [], time.perf_counter()
        while len(times) < LEAST or (time.perf_counter() - begin < SECONDS and len(times) < MOST):
            times.append(self.sample(calls) * 1e3)
        return {
            "kernel": f"ort webgpu {self.kernel}",
            "median_ms": statistics.median(times),
            "min_ms": min(times),
            "first_ms": self.first * 1e3,
            "error": self.error,
            "of_budget": self.of_budget,
            "right": self.of_budget is not None and self.of_budget <= 1.0,
            "timer": f"wall clock, {calls} calls and a read-back a wait",
        }


def model(nodes, operands, out):
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in operands.items()]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, out)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(helper.make_graph(nodes, "attention", inputs, outputs), opset_imports=opsets)
    made.ir_version = 10
    return made.SerializeToString()


def resident(operands, options):
    """The operands on the device. Python cannot make such a value, but a session can: one that negates what it is given."""
    nodes = [helper.make_node("Neg", [name], [f"{name}_"]) for name in operands]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in operands.items()]
    outputs = [helper.make_tensor_value_info(f"{name}_", TensorProto.FLOAT, x.shape) for name, x in operands.items()]
    made = helper.make_model(helper.make_graph(nodes, "upload", inputs, outputs), opset_imports=[helper.make_opsetid("", 21)])
    made.ir_version = 10
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=[PROVIDER], enable_fallback=0)
    binding = session.io_binding()
    for name, x in operands.items():
        binding.bind_cpu_input(name, -x)
        binding.bind_output(f"{name}_", "webgpu", 0)
    session.run_with_iobinding(binding)
    return dict(zip(operands, binding.get_outputs()))


def main():
    subjects = {}
    for line in sys.stdin:
        request = line.strip()
        try:
            if request not in subjects:
                subjects[request] = Subject(request)
            answer = subjects[request].answer()
        except Exception as error:  # whatever a peer fails with is its answer; the next request may fare better
            answer = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[-240:]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
