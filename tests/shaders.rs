//! Every renderable variant of every shader, checked without a GPU: valid with what it claims, written for every language, and
//! as its module describes it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use naga::back::{glsl, hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, SubgroupOperationSet, ValidationFlags, Validator};
use naga::{AddressSpace, Block, Module, ShaderStage, Statement, StorageAccess, TypeInner};
use wgpu_attention::internal::kernel::Variant;

struct Checked {
    variant: Variant,
    module: Module,
    info: ModuleInfo,
}

/// Every variant, parsed and validated with just the capabilities that it claims.
static EVERY: LazyLock<Vec<Checked>> = LazyLock::new(|| {
    let check = |variant: Variant| {
        let source = variant.wgsl();
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|error| panic!("{variant}\n{}", error.emit_to_string(&source)));
        // unpack2x16float is WebGPU's own; naga counts it as a capability for the sake of WebGL.
        let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        capabilities.set(Capabilities::SHADER_FLOAT16, variant.needs().f16);
        capabilities.set(Capabilities::SHADER_INT64, variant.needs().int64);
        capabilities.set(Capabilities::SUBGROUP, variant.needs().subgroups);
        capabilities.set(Capabilities::COOPERATIVE_MATRIX, variant.needs().matrices.is_some());
        let mut validator = Validator::new(ValidationFlags::all(), capabilities);
        if variant.needs().subgroups {
            validator
                .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
                .subgroup_operations(SubgroupOperationSet::all());
        }
        let info =
            validator.validate(&module).unwrap_or_else(|error| panic!("{variant}\n{}", error.emit_to_string(&source)));
        Checked { variant, module, info }
    };
    Variant::all().into_iter().map(check).collect()
});

fn each(check: impl FnMut(&Checked)) {
    EVERY.iter().for_each(check);
}

#[test]
fn every_variant_is_valid_with_just_what_it_claims() {
    each(|checked| assert_eq!(checked.module.entry_points.len(), 1, "{}", checked.variant));
}

#[test]
fn every_variant_is_written_for_every_language_that_has_what_it_uses() {
    each(|Checked { variant, module, info }| {
        let spirv = spv::Options { lang_version: (1, 3), ..spv::Options::default() };
        spv::write_vec(module, info, &spirv, None).unwrap_or_else(|error| panic!("{variant} for SPIR-V: {error}"));

        let metal = msl::Options { lang_version: (2, 4), ..msl::Options::default() };
        msl::write_string(module, info, &metal, &msl::PipelineOptions::default())
            .unwrap_or_else(|error| panic!("{variant} for MSL: {error}"));

        // HLSL and GLSL have no cooperative matrices, and wgpu offers none on their backends: plans for devices without have none
        // of those variants (tests/plan).
        if variant.needs().matrices.is_some() {
            return;
        }
        let direct = hlsl::Options { shader_model: hlsl::ShaderModel::V6_2, ..hlsl::Options::default() };
        let pipeline = hlsl::PipelineOptions::default();
        hlsl::Writer::new(&mut String::new(), &direct, &pipeline)
            .write(module, info, None)
            .unwrap_or_else(|error| panic!("{variant} for HLSL: {error}"));

        // GLSL ES 3.1 has no f16, and subgroups only by an extension: plans for devices without have none of those
        // variants (tests/plan).
        if !variant.needs().f16 && !variant.needs().subgroups && !variant.needs().int64 {
            let pipeline = glsl::PipelineOptions {
                shader_stage: ShaderStage::Compute,
                entry_point: "main".into(),
                multiview: None,
            };
            let (options, mut text) = (glsl::Options::default(), String::new());
            assert_eq!(options.version, glsl::Version::new_gles(310));
            glsl::Writer::new(&mut text, module, info, &options, &pipeline, Default::default())
                .and_then(|mut writer| writer.write())
                .unwrap_or_else(|error| panic!("{variant} for GLSL: {error}"));
        }
    });
}

/// Tint is the compiler of Chrome, and stricter than naga. `npm ci --ignore-scripts` in scripts/tint fetches it.
#[test]
#[ignore = "needs node and the packages of scripts/tint"]
fn every_variant_that_a_browser_could_run_is_accepted_by_tint() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tint");
    if folder.exists() {
        std::fs::remove_dir_all(&folder).unwrap();
    }
    std::fs::create_dir_all(&folder).unwrap();
    for variant in Variant::all() {
        // WebGPU has neither 64-bit integers nor cooperative matrices.
        if variant.needs().int64 || variant.needs().matrices.is_some() {
            println!("not for browsers: {variant}");
            continue;
        }
        // Tint demands this line, and naga refuses it.
        let enable = if variant.needs().subgroups { "enable subgroups; " } else { "" };
        // The careful pass of `rows` broadcasts in a loop whose condition is joined from broadcasts, so that it is the same in all lanes.
        // Tint does not see that, so the rule is off for this kernel.
        let uniform = matches!(variant, Variant::Rows(rows) if rows.tile.lanes.subgroup);
        let rule = if uniform { "diagnostic(off, subgroup_uniformity); " } else { "" };
        let text = format!("{enable}{rule}{}", variant.wgsl());
        std::fs::write(folder.join(format!("{variant}.wgsl")), text).unwrap();
    }
    let node = Command::new("node").arg(root.join("scripts/tint/check.mjs")).arg(&folder).output();
    let node = node.expect("node can be started");
    println!("{}", String::from_utf8_lossy(&node.stdout));
    assert!(node.status.success(), "{}: {}", node.status, String::from_utf8_lossy(&node.stderr));
}

/// `a || b` is a branch. Hundreds of them side by side, as unrolled loops make them, cost the compilers of drivers minutes and gigabytes:
/// SwiftShader's took 8 GB over 64 in one loop.
#[test]
fn unrolled_code_combines_conditions_without_branches() {
    fn branches(block: &Block) -> usize {
        let each = block.iter().map(|statement| match statement {
            Statement::If { accept, reject, .. } => 1 + branches(accept) + branches(reject),
            Statement::Loop { body, continuing, .. } => branches(body) + branches(continuing),
            Statement::Switch { cases, .. } => cases.iter().map(|case| branches(&case.body)).sum(),
            Statement::Block(body) => branches(body),
            _ => 0,
        });
        each.sum()
    }
    let mut most: BTreeMap<&str, usize> = BTreeMap::new();
    each(|Checked { variant, module, .. }| {
        let all = branches(&module.entry_points[0].function.body);
        let most = most.entry(variant.kernel()).or_default();
        *most = (*most).max(all);
    });
    println!("{most:?}");
    let at_most = most.values().max().expect("there are kernels");
    assert!(*at_most <= 130, "{most:?}");
}

#[test]
fn variants_have_names_of_their_own() {
    let all = Variant::all();
    let names: BTreeSet<String> = all.iter().map(Variant::to_string).collect();
    assert_eq!(names.len(), all.len(), "two variants share a name");
}

#[test]
fn bindings_are_those_that_the_module_describes() {
    each(|Checked { variant, module, .. }| {
        let mut found = BTreeMap::new();
        for (_, global) in module.global_variables.iter() {
            let Some(binding) = global.binding else { continue };
            assert_eq!(binding.group, 0, "{variant}");
            let written = match global.space {
                AddressSpace::Uniform => None,
                AddressSpace::Storage { access } => Some(access.contains(StorageAccess::STORE)),
                other => panic!("{variant} binds {other:?}"),
            };
            assert!(found.insert(binding.binding, written).is_none(), "{variant} binds {} twice", binding.binding);
        }
        let described = variant.bindings().into_iter().map(|(_, written)| Some(written));
        let want: BTreeMap<u32, Option<bool>> = (0..).zip(std::iter::once(None).chain(described)).collect();
        assert_eq!(found, want, "{variant}");
    });
}

#[test]
fn workgroups_are_as_large_as_the_module_describes() {
    each(|Checked { variant, module, .. }| {
        assert_eq!(module.entry_points[0].workgroup_size, [variant.threads(), 1, 1], "{variant}");
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        let shared = module.global_variables.iter().filter(|(_, global)| global.space == AddressSpace::WorkGroup);
        let bytes: u32 = shared.map(|(_, global)| layouter[global.ty].size).sum();
        assert_eq!(bytes, variant.workgroup_bytes(), "{variant}");
    });
}

#[test]
fn the_uniform_has_the_same_fields_at_the_same_offsets_on_both_sides() {
    each(|Checked { variant, module, .. }| {
        let fields = &variant.layout().members;
        let (_, uniform) = module.global_variables.iter().find(|(_, g)| g.space == AddressSpace::Uniform).unwrap();
        let TypeInner::Struct { members, span } = &module.types[uniform.ty].inner else { panic!("{variant}") };
        assert_eq!(*span as usize, 4 * fields.len(), "{variant}");
        assert_eq!(members.len(), fields.len(), "{variant}");
        for (n, (member, field)) in members.iter().zip(fields).enumerate() {
            assert_eq!((member.name.as_deref(), member.offset as usize), (Some(&*field.name), 4 * n), "{variant}");
            let TypeInner::Scalar(scalar) = module.types[member.ty].inner else { panic!("{variant} {field:?}") };
            let want = if field.kind == "f32" { naga::Scalar::F32 } else { naga::Scalar::U32 };
            assert_eq!(scalar, want, "{variant} {field:?}");
        }
    });
}

/// File stems with an extension in a folder of the repository.
fn stems(folder: &str, extension: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let stem = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
    paths.filter(|path| path.extension().is_some_and(|e| e == extension)).map(|path| stem(&path)).collect()
}

#[test]
fn no_line_of_a_shader_is_longer_than_120_columns() {
    for folder in ["shaders", "shaders/shared"] {
        for stem in stems(folder, "wgsl") {
            let path = format!("{folder}/{stem}.wgsl");
            let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&path)).unwrap();
            let longest = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
            assert!(longest <= 120, "{path} has a line of {longest} columns");
        }
    }
}

#[test]
fn every_shader_has_its_module_its_variants_and_its_reference() {
    let shaders = stems("shaders", "wgsl");
    let mut modules = stems("src/kernel", "rs");
    // What several kernels share.
    ["params", "uniform", "shader", "slot", "format", "body", "lanes", "fused", "eligibility", "attention", "render"]
        .iter()
        .for_each(|shared| assert!(modules.remove(*shared), "{shared} is gone"));
    assert_eq!(modules, Variant::all().iter().map(|variant| variant.kernel().to_owned()).collect());
    assert_eq!(shaders, modules);
    // The error budget and comparisons have no kernel, a list of rows is where results are put, and `layer` composes the others.
    let mut idle = stems("src/reference", "rs");
    ["budget", "compare", "comparison", "query", "layer"]
        .iter()
        .for_each(|exempt| assert!(idle.remove(*exempt), "{exempt} is gone"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for name in shaders {
        let text = std::fs::read_to_string(root.join(format!("shaders/{name}.wgsl"))).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("// Reference: "));
        let line = line.unwrap_or_else(|| panic!("shaders/{name}.wgsl names no reference"));
        for file in line.split(", ").map(|file| file.split(" (").next().unwrap().trim()) {
            assert!(root.join(file).is_file(), "shaders/{name}.wgsl: {file} does not exist");
            idle.remove(Path::new(file).file_stem().unwrap().to_str().unwrap());
        }
    }
    assert!(idle.is_empty(), "no shader names as its reference {idle:?}");
}
