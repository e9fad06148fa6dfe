//! `ds-bench nfe-sweep`: quality against NFE, methods × budgets × prompts × seeds.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::arm::{Arm, MethodSpec, PLAIN};
use super::contract::{self, Contract, MethodRates};
use super::manifest::{Manifest, SweepConfig};
use super::options::Layer;
use super::remote::RemoteBackend;
use super::sweep::{Shard, Sweep, Tally};
use super::wiring;
use crate::data::complaint;
use crate::data::prompts::{self, PromptList, PromptSource};
use crate::data::scenes::Split;
use crate::engine::request::{Listing, ModelRef};
use crate::engine::{Backend, CancelToken};
use crate::rewards::ensemble;
use crate::{Error, Result};

/// The reward held out unless another is named.
const JUDGE: &str = "judge";

/// Draw quality against NFE for plain sampling and search methods.
///
/// Every cell (method, budget, prompt, seed) is appended to OUT/cells.jsonl as
/// soon as it is done; the same command continues an interrupted sweep. Tables
/// (cells.csv, summary.csv, summary.md) and plots (nfe-sweep.svg, .png) are
/// written at the end. Options come from flags, then DS_BENCH_… variables, then
/// the file given with --config, then the defaults.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Args {
    #[command(flatten)]
    pub layer: Layer,
    /// TOML file of options; its keys are the flags below with underscores
    #[arg(long, env = "DS_BENCH_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Compute at most this many cells now
    #[arg(long, value_name = "CELLS")]
    pub limit: Option<usize>,
    /// Take every n-th prompt from the i-th on (i from 1); join with sweep-merge
    #[arg(long, value_name = "i/n")]
    pub shard: Option<Shard>,
    /// Accept a folder whose sweep has other methods, budgets, seeds, prompts or
    /// held-out reward, keeping the cells it has
    #[arg(long)]
    pub extend: bool,
    /// Print what each method does at each budget and what it all costs; run nothing
    #[arg(long)]
    pub dry_run: bool,
    /// No progress
    #[arg(long, short)]
    pub quiet: bool,
}

impl Args {
    /// The options of flags, environment and file together.
    ///
    /// # Errors
    /// When the file given with `--config` is unusable.
    pub fn options(&self) -> Result<Layer> {
        let file = self.config.as_deref().map(Layer::read).transpose()?;
        Ok(self.layer.clone().over(file.unwrap_or_default()))
    }

    /// The backend that the options ask for: a server, or the engine in process.
    ///
    /// # Errors
    /// When the server does not answer or the models cannot be loaded.
    pub fn backend(&self) -> Result<Box<dyn Backend>> {
        let options = self.options()?;
        match &options.url {
            Some(url) => Ok(Box::new(RemoteBackend::from_env(url)?)),
            None => {
                let placement = options.placement()?;
                wiring::open_engine(&options.models.unwrap_or_else(|| "models".into()), &placement)
            }
        }
    }
}

/// Runs the command on `backend`; `command` is recorded as what made the folder.
///
/// # Errors
/// When an option is unusable, the folder holds another sweep, or the backend fails.
pub fn run(
    args: &Args,
    backend: &dyn Backend,
    command: &str,
    cancel: &CancelToken,
) -> Result<Option<Tally>> {
    let sweep = configure(args, backend, command, cancel)?;
    if args.dry_run {
        print!("{}", describe(&sweep, backend)?);
        return Ok(None);
    }
    sweep.run(backend, cancel).map(Some)
}

/// Checks the options against what `backend` has and fills in the defaults. Where budgets are
/// times, measures the methods that the folder has no rates of.
///
/// # Errors
/// Names the option that is unusable; the backend's.
pub fn configure(
    args: &Args,
    backend: &dyn Backend,
    command: &str,
    cancel: &CancelToken,
) -> Result<Sweep> {
    let options = args.options()?;
    let methods = options.methods.unwrap_or_else(|| vec!["plain".into(), "best-of-n".into()]);
    let methods = methods.iter().map(|m| MethodSpec::parse(m)).collect::<Result<Vec<_>>>()?;
    let budgets = options.budgets.unwrap_or_else(|| vec![100, 200]);
    let seeds = options.seeds.map_or_else(|| vec![0], |s| s.0);
    distinct("methods", methods.iter().map(|m| m.label.clone()))?;
    distinct("budgets", budgets.iter().copied())?;
    distinct("seeds", seeds.iter().copied())?;
    if budgets.contains(&0) {
        return Err(Error::invalid("budgets", "must be positive"));
    }
    if let Some(reference) = options.reference_budget
        && !(budgets.contains(&reference) && methods.iter().any(|m| m.label == PLAIN))
    {
        let message = format!("plain does not run at {reference} in this sweep");
        return Err(Error::invalid("reference_budget", message));
    }
    let known = backend.methods();
    for method in &methods {
        check("methods", "method", &method.name, &known)?;
    }
    let model = model(options.model.as_deref(), backend)?;
    for adapter in methods.iter().filter_map(|m| m.adapter.as_ref()).chain(options.adapter.as_ref())
    {
        if !model.adapters.contains(adapter) {
            let known = model.adapters.iter().map(String::as_str);
            return Err(Error::unknown("adapter", "adapter", adapter, known));
        }
    }
    let (reward, held_out) = rewards(options.reward, options.held_out, &backend.rewards())?;
    let replay = options.replay.unwrap_or(false);
    if replay && !replays(&reward, &backend.rewards()) {
        let message = format!("'{reward}' is no single reward of which more is better");
        return Err(Error::invalid("replay", message));
    }
    let contract = options.contract.unwrap_or_default();
    if replay && contract == Contract::EqualLatency {
        return Err(Error::invalid("replay", "derives budgets of forwards, not of time"));
    }
    let (steps, min_steps) = (options.steps.unwrap_or(50), options.min_steps.unwrap_or(10));
    for (field, value) in [("steps", steps), ("min_steps", min_steps)] {
        if value == 0 {
            return Err(Error::invalid(field, "must be positive"));
        }
    }
    let guidance_scale = options.guidance.unwrap_or(model.default_guidance_scale);
    if !guidance_scale.is_finite() {
        return Err(Error::invalid("guidance", "must be a number"));
    }
    let out = options.out.ok_or_else(|| Error::invalid("out", "missing: give a folder"))?;
    let spec = options.prompts.unwrap_or(PromptSource::Scenes { split: Split::Test, count: 8 });
    let list = prompts::load(&spec)?;
    let prompts_source = described(&spec, &list);
    let config = SweepConfig {
        model: ModelRef { id: model.id, sha256: model.sha256 },
        adapter: options.adapter,
        reward,
        held_out,
        steps,
        min_steps,
        guidance_scale,
        methods: methods.iter().map(|m| m.label.clone()).collect(),
        budgets,
        seeds,
        prompts: list.prompts,
        replay,
        fewer_prompts: options.fewer_prompts.unwrap_or_default(),
        contract,
        shard: args.shard.map(|s| s.to_string()),
    };
    let rates = match contract {
        Contract::EqualF => MethodRates::new(),
        Contract::EqualLatency => {
            let known = Manifest::read(&out)?.map(|there| there.rates).unwrap_or_default();
            contract::measure(backend, &config, &methods, known, cancel)?
        }
    };
    Ok(Sweep {
        manifest: Manifest {
            format: 1,
            config,
            reference_budget: options.reference_budget,
            rates,
            prompts_source,
            command: command.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        methods,
        shard: args.shard,
        out,
        limit: args.limit,
        extend: args.extend,
        quiet: args.quiet,
    })
}

/// Where prompts came from, for the report; what was left out is said at once, too.
pub(super) fn described(source: &PromptSource, list: &PromptList) -> String {
    let name = match source {
        PromptSource::Scenes { split: Split::Test, .. } => {
            return "the scene world's held-out test split".into();
        }
        PromptSource::Scenes { split, .. } => return format!("the scene world's {split} split"),
        PromptSource::File { path, .. } => path.file_name().unwrap_or(path.as_os_str()),
    };
    let name = name.to_string_lossy();
    if list.skipped.is_empty() {
        return format!("`{name}`");
    }
    let rows = list.prompts.len() + list.skipped.len();
    tracing::warn!("{}", complaint(&list.skipped, rows));
    format!("`{name}` ({} of {rows} rows could not be used)", list.skipped.len())
}

pub(super) fn distinct<T: Ord + Clone + std::fmt::Display>(
    field: &str,
    values: impl Iterator<Item = T>,
) -> Result<()> {
    let mut seen = BTreeSet::new();
    for value in values {
        if !seen.insert(value.clone()) {
            return Err(Error::invalid(field, format!("{value} is given twice")));
        }
    }
    if seen.is_empty() { Err(Error::invalid(field, "give at least one")) } else { Ok(()) }
}

fn check(field: &str, what: &'static str, name: &str, known: &[Listing]) -> Result<()> {
    if known.iter().any(|k| k.name == name) {
        return Ok(());
    }
    Err(Error::unknown(field, what, name, known.iter().map(|k| k.name.as_str())))
}

fn model(id: Option<&str>, backend: &dyn Backend) -> Result<crate::engine::request::ModelInfo> {
    let models = backend.models();
    let found = match id {
        Some(id) => models.iter().find(|m| m.id == id),
        None => models.first(),
    };
    found.cloned().ok_or_else(|| {
        let known = models.iter().map(|m| m.id.as_str());
        Error::unknown("model", "model", id.unwrap_or_default(), known)
    })
}

/// Whether candidates are ranked by the score that is kept of them.
fn replays(reward: &str, known: &[Listing]) -> bool {
    let listed = known.iter().find(|listing| listing.name == reward);
    listed.is_some_and(|l| l.params.get("higher_is_better") != Some(&serde_json::json!(false)))
}

/// The searched and the held-out reward.
fn rewards(
    reward: Option<String>,
    held_out: Option<String>,
    known: &[Listing],
) -> Result<(String, Option<String>)> {
    let names = || known.iter().map(|k| k.name.clone());
    // Of an ensemble every member.
    for name in reward.as_deref().map(ensemble::names).transpose()?.into_iter().flatten() {
        check("reward", "reward", name, known)?;
    }
    if let Some(name) = held_out.as_ref().filter(|name| *name != "none") {
        check("held_out", "reward", name, known)?;
    }
    let searched = match reward {
        Some(name) => name,
        None => {
            let avoid = held_out.clone().unwrap_or_else(|| JUDGE.into());
            names()
                .find(|n| *n != avoid)
                .or_else(|| names().next())
                .ok_or_else(|| Error::invalid("reward", "the backend has no reward"))?
        }
    };
    let members = ensemble::names(&searched)?;
    let is_searched = |name: &str| members.contains(&name);
    let held_out = match held_out {
        Some(name) if name == "none" => None,
        Some(name) if is_searched(&name) => {
            return Err(Error::invalid("held_out", format!("{name} is the searched reward")));
        }
        Some(name) => Some(name),
        None => names()
            .find(|n| n == JUDGE && !is_searched(n))
            .or_else(|| names().find(|n| !is_searched(n))),
    };
    Ok((searched, held_out))
}

/// The grid of a sweep as text.
fn describe(sweep: &Sweep, backend: &dyn Backend) -> Result<String> {
    let config = &sweep.manifest.config;
    let held: Vec<usize> =
        (0..config.prompts.len()).filter(|&p| sweep.shard.is_none_or(|s| s.holds(p))).collect();
    let mut lines = vec![format!(
        "model {}, reward {}, held out {}, {} prompts, {} seeds",
        config.model.id,
        config.reward,
        config.held_out.as_deref().unwrap_or("none"),
        held.len(),
        config.seeds.len()
    )];
    let arms = sweep.arms(backend)?;
    let mut total = 0;
    for (label, budget, arm) in &arms {
        let at = format!("{label} at {}", config.contract.show(*budget));
        let runs = |other| arms.iter().any(|(l, b, arm)| l == label && *b == other && arm.runs());
        let method = sweep.methods.iter().find(|m| m.label == *label);
        let computes =
            |prompt: usize| method.is_some_and(|m| sweep.computes(m, *budget, prompt, runs));
        let images = (held.iter().filter(|&&p| computes(p)).count() * config.seeds.len()) as u64;
        total += arm.f() * images;
        lines.push(match arm {
            Arm::Infeasible(reason) => format!("{at}: not run: {reason}"),
            Arm::Run { .. } if images == 0 => format!("{at}: derived from a larger budget"),
            Arm::Run { method, request, f, .. } => {
                let stands_in = if arm.is_fallback() {
                    format!(" (runs {}: the budget is too small)", method.label)
                } else {
                    String::new()
                };
                let steps = request.steps.unwrap_or_default();
                let count = if images == 1 { "image" } else { "images" };
                format!("{at}: {steps} steps, {f} forwards, {images} {count}{stands_in}")
            }
        });
    }
    lines.push(format!("{total} forwards in all\n"));
    Ok(lines.join("\n"))
}

/// A command line as a shell would take it.
#[must_use]
pub fn shell_line(args: impl IntoIterator<Item = String>) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./,:@%".contains(c);
    let quote = |arg: String| {
        if !arg.is_empty() && arg.chars().all(plain) {
            arg
        } else {
            format!("'{}'", arg.replace('\'', r"'\''"))
        }
    };
    args.into_iter().map(quote).collect::<Vec<_>>().join(" ")
}
