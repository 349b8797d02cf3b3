//! The environment variables that wgpu reads.

use crate::contract::error::{Error, Result};
use crate::device::gpu::Gpu;

/// Variables that wgpu passes over in silence where it does not know their value, and the values that it knows, in any case.
const VARIABLES: [(&str, &[&str], &str); 10] = [
    ("WGPU_POWER_PREF", &["low", "high", "none"], "low, high or none"),
    ("WGPU_GLES_MINOR_VERSION", &["automatic", "0", "1", "2"], "automatic, 0, 1 or 2"),
    ("WGPU_GL_FENCE_BEHAVIOR", &["normal", "autofinish"], "normal or autofinish"),
    (
        "WGPU_GL_DEBUG_FNS",
        &["auto", "forceenabled", "force_enabled", "enabled", "disabled"],
        "auto, forceenabled or disabled",
    ),
    ("WGPU_DX12_COMPILER", &["fxc", "dxc", "dynamicdxc", "staticdxc", "auto"], "fxc, dxc, staticdxc or auto"),
    ("WGPU_DX12_PRESENTATION_SYSTEM", &["dxgifromvisual", "visual", "dxgifromhwnd", "hwnd"], "visual or hwnd"),
    ("WGPU_DX12_USE_FRAME_LATENCY_WAITABLE_OBJECT", &["none", "wait", "dontwait"], "none, wait or dontwait"),
    ("WGPU_DX12_AGILITY_SDK_REQUIRE", &["0", "1"], "0 or 1"),
    ("WGPU_NOOP_BACKEND", &["0", "1"], "0 or 1"),
    ("WGPU_DX12_AGILITY_SDK_VERSION", &[], "a whole number"),
];

/// Backends as `WGPU_BACKEND` names them.
const BACKENDS: [&str; 11] =
    ["vulkan", "vk", "dx12", "d3d12", "metal", "mtl", "opengl", "gles", "gl", "webgpu", "noop"];

/// The first variable whose value nobody understands. A list of backends has commas. An empty value of any other variable
/// counts as none.
fn unknown_variable(value: impl Fn(&str) -> Option<String>) -> Result<()> {
    let error = |variable, value: String, want| Err(Error::Environment { variable, value, want });
    if let Some(backends) = value("WGPU_BACKEND") {
        let known = |name: &str| BACKENDS.contains(&name.trim());
        if !backends.to_lowercase().split(',').all(known) {
            return error(
                "WGPU_BACKEND",
                backends,
                "vulkan, metal, dx12 or gl, or several of them with commas between",
            );
        }
    }
    for (variable, known, want) in VARIABLES {
        let Some(value) = value(variable).filter(|value| !value.is_empty()) else { continue };
        let right = match known {
            [] => value.parse::<u32>().is_ok(),
            _ => known.contains(&value.to_lowercase().as_str()),
        };
        if !right {
            return error(variable, value, want);
        }
    }
    Ok(())
}

/// An environment variable, whatever its bytes.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

impl Gpu {
    /// Refuses what wgpu would ignore: an environment variable that it reads (`WGPU_BACKEND`, `WGPU_POWER_PREF`, …) with a value
    /// that it does not know. All functions that choose an adapter call this, except for [`Gpu::adapters`], which cannot fail.
    ///
    /// # Errors
    ///
    /// [`Error::Environment`] for the first such variable.
    pub fn check_environment() -> Result<()> {
        unknown_variable(variable)
    }
}

#[cfg(test)]
mod tests {
    use super::unknown_variable;
    use crate::contract::error::Error;

    #[test]
    fn variables_that_wgpu_would_ignore_are_named() {
        let set = |name: &'static str, value: &'static str| {
            unknown_variable(move |variable| (variable == name).then(|| value.to_owned()))
        };
        for (variable, good, bad) in [
            ("WGPU_BACKEND", &["vulkan", "VK, gl", "metal,dx12,noop"][..], &["vulkna", "", "vulkan,", "vulkan gl"][..]),
            ("WGPU_POWER_PREF", &["low", "High", "none", ""], &["frugal", "low "]),
            ("WGPU_GLES_MINOR_VERSION", &["Automatic", "2"], &["3", "es3"]),
            ("WGPU_GL_FENCE_BEHAVIOR", &["normal", "AutoFinish"], &["finish"]),
            ("WGPU_GL_DEBUG_FNS", &["auto", "force_enabled"], &["1"]),
            ("WGPU_DX12_COMPILER", &["Fxc", "dynamicdxc"], &["gcc"]),
            ("WGPU_DX12_PRESENTATION_SYSTEM", &["Visual", "hwnd"], &["window"]),
            ("WGPU_DX12_USE_FRAME_LATENCY_WAITABLE_OBJECT", &["DontWait"], &["no"]),
            ("WGPU_DX12_AGILITY_SDK_REQUIRE", &["0", "1"], &["yes"]),
            ("WGPU_DX12_AGILITY_SDK_VERSION", &["615"], &["1.615", "-1"]),
            ("WGPU_NOOP_BACKEND", &["1"], &["true"]),
            // Free text, and flags for which everything but 0 is yes.
            ("WGPU_ADAPTER_NAME", &["anything"], &[]),
            ("WGPU_VALIDATION", &["anything"], &[]),
        ] {
            for &value in good {
                assert_eq!(set(variable, value), Ok(()), "{variable}={value}");
            }
            for &value in bad {
                let error = set(variable, value).unwrap_err();
                assert!(matches!(&error, Error::Environment { variable: named, .. } if *named == variable), "{error}");
                let text = error.to_string();
                assert!(text.contains(variable) && text.contains(&format!("{value:?}; it must be ")), "{text}");
            }
        }
    }
}
