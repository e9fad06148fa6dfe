//! `ds-serve`: serves the models of a folder over HTTP.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use clap::{CommandFactory, FromArgMatches, Parser};
use diffusion_sharpening::engine::{Backend, Engine};
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::nn::threads;
use diffusion_sharpening::serve::config::{LogFormat, Origins};
use diffusion_sharpening::serve::{self, Overrides, Settings, auth, health_check};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Serves text-to-image models over HTTP: POST /generate, and a page at / that
/// compares methods on one prompt and one noise.
///
/// Every setting may be given as a flag, as an environment variable or as a key
/// of the TOML file (its name with underscores); flags win over the environment,
/// which wins over the file.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// TOML file with settings.
    #[arg(long, env = "DS_CONFIG", value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Print the settings in effect as TOML, each with where its value comes from, and exit.
    #[arg(long)]
    print_config: bool,
    /// Print a new API key and the hash of it that goes into the file of --keys, and exit.
    #[arg(long)]
    make_key: bool,
    /// Ask a running server how it is, such as http://127.0.0.1:8080/startupz, and exit: with
    /// status 0 when it answers 200.
    #[arg(long, value_name = "URL")]
    health_check: Option<String>,
    #[command(flatten)]
    settings: Overrides,
}

fn main() -> anyhow::Result<()> {
    let arguments = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&arguments).unwrap_or_else(|error| error.exit());
    if cli.make_key {
        let (key, hash) = auth::make_key()?;
        writeln!(std::io::stdout(), "key:    {key}\nsha256: {hash}")?;
        return Ok(());
    }
    if let Some(url) = &cli.health_check {
        return Ok(health_check(url)?);
    }
    let settings = Settings::resolve(cli.config.as_deref(), cli.settings)?;
    let mut out = std::io::stdout();
    if cli.print_config {
        let origins = Origins::of(cli.config.as_deref(), &arguments)?;
        out.write_all(settings.to_toml_with(&origins)?.as_bytes())?;
        return Ok(());
    }
    start_log(&settings)?;
    let models = settings.models.clone();
    ensure!(
        models.is_dir(),
        "models: there is no folder {}; give one with --models",
        models.display()
    );
    threads::start(settings.threads)?;
    let placement = Placement::new(settings.device, settings.dtype, settings.vae_dtype)?;
    let running = serve::start(settings, move || open_backend(&models, &placement))?;
    serve::stop_on_signals(running.stopper())?;
    writeln!(out, "listening on http://{}", running.address())?;
    running.wait()?;
    Ok(())
}

/// Opens the engine over a folder of checkpoints.
fn open_backend(
    models: &Path,
    placement: &Placement,
) -> diffusion_sharpening::Result<Arc<dyn Backend>> {
    Ok(Arc::new(Engine::open(models, placement)?))
}

fn start_log(settings: &Settings) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&settings.log)
        .with_context(|| format!("log: '{}' is not a log filter", settings.log))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match settings.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
