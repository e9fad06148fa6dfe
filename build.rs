//! Compiles the GPU kernels when the feature `cuda` is on.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some()
        && let Err(message) = kernels::compile()
    {
        eprintln!("{message}");
        std::process::exit(1);
    }
}

mod kernels {
    use std::ffi::OsStr;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::{env, fs};

    const SOURCES: &str = "src/nn/cuda/kernels";
    /// Machine code for these compute capabilities; newer ones compile PTX of the first at
    /// their start.
    const ARCHITECTURES: [u32; 4] = [80, 86, 89, 90];

    /// Makes `NAME.fatbin` of every `NAME.cu` and `kernels.rs`, a list of them, in `OUT_DIR`.
    /// `DS_CUDA_ARCHITECTURES` (such as `90` or `80,90`) replaces the list above.
    pub fn compile() -> Result<(), String> {
        for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "DS_CUDA_ARCHITECTURES"] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        println!("cargo:rerun-if-changed={SOURCES}");
        let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
        let entries = fs::read_dir(SOURCES).map_err(|e| format!("{SOURCES}: {e}"))?;
        let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        files.sort();
        let sources = files.into_iter().filter(|f| f.extension() == Some(OsStr::new("cu")));
        let (nvcc, architectures) = (nvcc(), architectures()?);
        let mut running = Vec::new();
        let mut list = String::from("/// The compiled kernels by source file.\n");
        list += "pub const IMAGES: &[(&str, &[u8])] = &[\n";
        for source in sources {
            println!("cargo:rerun-if-changed={}", source.display());
            let name = source.file_stem().and_then(OsStr::to_str).ok_or("a file without a name")?;
            let image = out.join(format!("{name}.fatbin"));
            list += &format!("    ({name:?}, include_bytes!({image:?})),\n");
            running.push((source.clone(), start(&nvcc, &source, &image, &architectures)?));
        }
        for (source, mut child) in running {
            let status = child.wait().map_err(|e| format!("{}: {e}", nvcc.display()))?;
            if !status.success() {
                return Err(format!("{} did not compile {}", nvcc.display(), source.display()));
            }
        }
        list += "];\n";
        fs::write(out.join("kernels.rs"), list).map_err(|e| e.to_string())
    }

    fn start(
        nvcc: &Path,
        source: &Path,
        image: &Path,
        architectures: &[u32],
    ) -> Result<std::process::Child, String> {
        let mut command = Command::new(nvcc);
        command.args(["-fatbin", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-o"]);
        command.arg(image).arg(source);
        for (i, architecture) in architectures.iter().enumerate() {
            let ptx = if i == 0 { format!(",compute_{architecture}") } else { String::new() };
            let code = format!("[sm_{architecture}{ptx}]");
            command.arg(format!("-gencode=arch=compute_{architecture},code={code}"));
        }
        command.spawn().map_err(|e| {
            let nvcc = nvcc.display();
            format!("{nvcc}: {e}; the feature cuda needs CUDA's compiler, see docs/gpu.md")
        })
    }

    fn nvcc() -> PathBuf {
        if let Some(path) = env::var_os("NVCC") {
            return path.into();
        }
        let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
        let found = homes.map(|home| Path::new(&home).join("bin/nvcc")).find(|path| path.is_file());
        found.unwrap_or_else(|| "nvcc".into())
    }

    fn architectures() -> Result<Vec<u32>, String> {
        let Ok(given) = env::var("DS_CUDA_ARCHITECTURES") else {
            return Ok(ARCHITECTURES.to_vec());
        };
        let parsed: Result<Vec<u32>, _> = given.split(',').map(|a| a.trim().parse()).collect();
        parsed.map_err(|_| {
            format!("DS_CUDA_ARCHITECTURES: expected numbers such as 80,90, got '{given}'")
        })
    }
}
