//! Every renderable variant of every shader, checked without a GPU.

use naga::valid::{Capabilities, ValidationFlags, Validator};
use wgpu_attention::kernel::Variant;
use wgpu_attention::shader;

#[test]
fn every_variant_is_valid() {
    for variant in Variant::all() {
        let source = shader::render(&variant);
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|e| panic!("{variant}\n{}", e.emit_to_string(&source)));
        Validator::new(ValidationFlags::all(), Capabilities::all())
            .validate(&module)
            .unwrap_or_else(|e| panic!("{variant}\n{}", e.emit_to_string(&source)));
    }
}
