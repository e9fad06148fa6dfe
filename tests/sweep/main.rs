//! Sweeps on a deterministic fake backend, in process and over HTTP.

mod fake;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use diffusion_sharpening::Result;
use diffusion_sharpening::bench::cell::{self, Cell};
use diffusion_sharpening::bench::nfe_sweep::{self, Args};
use diffusion_sharpening::bench::options::Layer;
use diffusion_sharpening::bench::sweep::Tally;
use diffusion_sharpening::bench::{remote::RemoteBackend, sweep_merge};
use diffusion_sharpening::engine::{Backend, CancelToken};
use fake::Fake;
use proptest::prelude::*;
use tempfile::TempDir;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

/// A folder with a prompt file; sweeps go to folders beside it.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new(prompts: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text: String = (0..prompts).map(|i| format!("{i} red circles\n")).collect();
        std::fs::write(dir.path().join("prompts.txt"), text).unwrap();
        Self { dir }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Arguments on the prompt file and a folder, without progress.
    fn args(&self, out: &str, flags: &str) -> Args {
        let (prompts, out) = (self.out("prompts.txt"), self.out(out));
        let fixed = ["ds-bench", "--quiet", "--prompts", prompts.to_str().unwrap(), "--out"];
        let fixed = fixed.into_iter().chain([out.to_str().unwrap()]);
        Cli::parse_from(fixed.chain(flags.split_whitespace())).args
    }

    fn sweep(&self, out: &str, flags: &str, backend: &dyn Backend) -> Result<Tally> {
        let args = self.args(out, flags);
        nfe_sweep::run(&args, backend, "ds-bench nfe-sweep …", &CancelToken::default())
            .map(Option::unwrap)
    }

    fn cells(&self, out: &str) -> Vec<Cell> {
        read_cells(&self.out(out))
    }

    fn text(&self, out: &str, file: &str) -> String {
        std::fs::read_to_string(self.out(out).join(file)).unwrap()
    }
}

fn read_cells(dir: &Path) -> Vec<Cell> {
    cell::read(&dir.join("cells.jsonl")).unwrap()
}

/// Cells without what a clock measured, in a fixed order.
fn values(mut cells: Vec<Cell>) -> Vec<Cell> {
    cells.iter_mut().for_each(|c| c.seconds = 0.0);
    cells.sort_by_key(Cell::key);
    cells
}

const SMALL: &str = "--methods plain,best-of-n --budgets 60,100,300 --seeds 0..2";

#[test]
fn a_sweep_writes_every_cell_and_every_report() {
    let bench = Bench::new(3);
    let tally = bench.sweep("a", SMALL, &Fake::default()).unwrap();
    assert_eq!((tally.ran, tally.kept, tally.remaining, tally.infeasible), (36, 0, 0, 0));
    let cells = bench.cells("a");
    assert_eq!(cells.iter().map(Cell::key).collect::<BTreeSet<_>>().len(), 36);
    let one = cells.iter().find(|c| c.method == "best-of-n" && c.budget == 300).unwrap();
    assert_eq!((one.f, one.v, one.y, one.steps), (300, 3, 3, 50));
    assert_eq!(one.params["n"], 3);
    assert_eq!(one.stages["unet"], 0.3);
    assert!(one.seconds > 0.0 && one.scores.len() == 2);

    let out = bench.out("a");
    let png = image::open(out.join("nfe-sweep.png")).unwrap().to_rgb8();
    assert!(png.width() > 1000 && png.pixels().any(|p| p.0 == [0, 114, 178]));
    let svg = bench.text("a", "nfe-sweep.svg");
    for text in ["best-of-n", "searched: clip", "held out: judge", "NFE"] {
        assert!(svg.contains(text), "{text}");
    }
    let rows = |file: &str| csv::Reader::from_path(out.join(file)).unwrap().records().count();
    assert_eq!((rows("cells.csv"), rows("summary.csv")), (36, 6));
    let table = bench.text("a", "summary.md");
    assert!(table.contains("ds-bench nfe-sweep …"), "{table}");
    let reference = table.lines().find(|l| l.contains("reference |")).unwrap();
    assert!(reference.starts_with("| `plain` | 100 | 50 |"), "{reference}");
    // Best-of-1 is plain sampling: the paired difference is exactly nothing.
    let same = table.lines().find(|l| l.starts_with("| `best-of-n` | 100 |")).unwrap();
    assert!(same.contains("+0.0000 [+0.0000, +0.0000]"), "{same}");
}

#[test]
fn plain_takes_as_many_steps_as_its_budget_pays_for() {
    let bench = Bench::new(1);
    let flags = "--methods plain --budgets 20,99,5000,6000";
    bench.sweep("a", flags, &Fake::default()).unwrap();
    let got: Vec<_> = bench.cells("a").iter().map(|c| (c.steps, c.f)).collect();
    // A schedule of 1,000 steps cannot spend more than 2,000 forwards.
    assert_eq!(got, [(10, 20), (49, 98), (1000, 2000), (0, 0)]);
    assert!(bench.cells("a")[3].infeasible.as_ref().unwrap().contains("budget 5000"));
    bench.sweep("b", "--methods plain --budgets 99 --guidance 1", &Fake::default()).unwrap();
    assert_eq!((bench.cells("b")[0].steps, bench.cells("b")[0].f), (99, 99));
}

#[test]
fn below_one_trajectory_plain_stands_in_and_says_so() {
    let bench = Bench::new(2);
    let flags = "--methods best-of-n --budgets 12,60,100";
    let tally = bench.sweep("a", flags, &Fake::default()).unwrap();
    assert_eq!((tally.ran, tally.infeasible), (6, 2));
    let cells = bench.cells("a");
    let at = |budget| cells.iter().find(|c| c.budget == budget).unwrap();
    assert_eq!((at(12).method.as_str(), at(12).f), ("best-of-n", 0));
    assert!(at(12).infeasible.as_ref().unwrap().contains("10 steps of plain sampling cost 20"));
    assert_eq!(at(60).method, "plain");
    assert_eq!(at(60).requested_method.as_deref(), Some("best-of-n"));
    assert_eq!((at(60).steps, at(60).f), (30, 60));
    assert_eq!((at(100).method.as_str(), at(100).requested_method.as_ref()), ("best-of-n", None));
    let table = bench.text("a", "summary.md");
    assert!(table.contains("stands in for `best-of-n`") && table.contains("Not run"), "{table}");
    // Resuming recognises cells by the method that was asked for.
    assert_eq!(bench.sweep("a", flags, &Fake::default()).unwrap().kept, 6);
}

#[test]
fn reruns_agree_and_recompute_nothing() {
    let bench = Bench::new(2);
    bench.sweep("a", SMALL, &Fake::default()).unwrap();
    bench.sweep("b", SMALL, &Fake::default()).unwrap();
    assert_eq!(values(bench.cells("a")), values(bench.cells("b")));
    let (before, backend) = (bench.text("a", "cells.jsonl"), Fake::default());
    let tally = bench.sweep("a", SMALL, &backend).unwrap();
    assert_eq!((tally.ran, tally.kept), (0, 24));
    assert_eq!(backend.calls.into_inner(), 0);
    assert_eq!(bench.text("a", "cells.jsonl"), before);
}

#[test]
fn another_configuration_is_refused_by_name() {
    let bench = Bench::new(2);
    bench.sweep("a", SMALL, &Fake::default()).unwrap();
    let refused = |flags: &str| {
        let before = bench.text("a", "cells.jsonl");
        let e = bench.sweep("a", flags, &Fake::default()).unwrap_err().to_string();
        assert_eq!(bench.text("a", "cells.jsonl"), before);
        e
    };
    let e = refused(&format!("{SMALL} --steps 25"));
    assert!(e.contains("steps: 50 there, 25 asked for"), "{e}");
    let e = refused(&format!("{SMALL} --steps 25 --extend"));
    assert!(e.contains("steps: 50 there"), "{e}");
    let more = "--methods plain,best-of-n --budgets 60,100,300,400 --seeds 0..2";
    let e = refused(more);
    assert!(e.contains("budgets: [60,100,300] there, [60,100,300,400] asked for"), "{e}");
    let tally = bench.sweep("a", &format!("{more} --extend"), &Fake::default()).unwrap();
    assert_eq!((tally.ran, tally.kept), (8, 24));
}

#[test]
fn missing_scores_are_left_out_and_counted() {
    let bench = Bench::new(3);
    let fake = Fake { judge_fails_at: Some(2), ..Fake::default() };
    bench.sweep("a", "--methods plain --budgets 100 --seeds 0..3", &fake).unwrap();
    let cells = bench.cells("a");
    assert_eq!(cells.iter().filter(|c| c.scores["judge"].is_none()).count(), 6);
    assert_eq!(bench.text("a", "cells.jsonl").matches("\"judge\":null").count(), 6);
    let mut reader = csv::Reader::from_path(bench.out("a").join("summary.csv")).unwrap();
    let headers = reader.headers().unwrap().clone();
    let row = reader.records().next().unwrap().unwrap();
    let get = |name: &str| &row[headers.iter().position(|h| h == name).unwrap()];
    assert_eq!((get("n"), get("judge_n"), get("judge_missing")), ("9", "3", "6"));
    assert_eq!((get("clip_n"), get("clip_missing")), ("9", "0"));
    let scores: Vec<f64> = cells.iter().filter_map(|c| c.scores["judge"]).collect();
    let mean = scores.iter().sum::<f64>() / 3.0;
    assert!((get("judge_mean").parse::<f64>().unwrap() - mean).abs() < 1e-12);

    let all = Fake { judge_fails_at: Some(1), ..Fake::default() };
    bench.sweep("b", "--methods plain --budgets 100", &all).unwrap();
    assert!(bench.text("b", "summary.md").contains("| – |"));
}

#[test]
fn shards_partition_the_grid_and_merge_into_it() {
    let bench = Bench::new(5);
    bench.sweep("whole", SMALL, &Fake::default()).unwrap();
    let mut joined = Vec::new();
    for i in 1..=3 {
        bench.sweep(&format!("s{i}"), &format!("{SMALL} --shard {i}/3"), &Fake::default()).unwrap();
        joined.extend(bench.cells(&format!("s{i}")));
    }
    assert_eq!(joined.len(), 60);
    assert_eq!(values(joined), values(bench.cells("whole")));
    let shards = (1..=3).map(|i| bench.out(&format!("s{i}"))).collect();
    sweep_merge::run(&sweep_merge::Args { shards, out: Some(bench.out("all")) }).unwrap();
    assert_eq!(values(bench.cells("all")), values(bench.cells("whole")));
    let means = |out: &str| -> Vec<String> {
        let mut reader = csv::Reader::from_path(bench.out(out).join("summary.csv")).unwrap();
        let at = reader.headers().unwrap().iter().position(|h| h == "judge_low").unwrap();
        reader.records().map(|r| r.unwrap()[at].to_owned()).collect()
    };
    assert_eq!(means("all"), means("whole"));

    let other = [bench.out("s1"), bench.out("other")];
    bench.sweep("other", &format!("{SMALL} --steps 30"), &Fake::default()).unwrap();
    let args = sweep_merge::Args { shards: other.into(), out: Some(bench.out("no")) };
    assert!(sweep_merge::run(&args).unwrap_err().to_string().contains("another sweep"));
    assert!("0/3".parse::<diffusion_sharpening::bench::sweep::Shard>().is_err());
}

#[test]
fn cancelling_and_limits_leave_a_folder_that_resumes() {
    let bench = Bench::new(2);
    bench.sweep("whole", SMALL, &Fake::default()).unwrap();
    let tally = bench.sweep("a", &format!("{SMALL} --limit 5"), &Fake::default()).unwrap();
    assert_eq!((tally.ran, tally.remaining, tally.interrupted), (5, 19, false));
    let fake = Fake { cancel_at: Some(4), ..Fake::default() };
    let tally = bench.sweep("a", SMALL, &fake).unwrap();
    assert_eq!((tally.ran, tally.kept, tally.remaining, tally.interrupted), (3, 5, 16, true));
    assert!(bench.out("a").join("nfe-sweep.png").exists());
    bench.sweep("a", SMALL, &Fake::default()).unwrap();
    assert_eq!(values(bench.cells("a")), values(bench.cells("whole")));
}

#[test]
fn a_broken_line_in_the_middle_is_an_error_with_its_number() {
    let bench = Bench::new(1);
    bench.sweep("a", SMALL, &Fake::default()).unwrap();
    let path = bench.out("a").join("cells.jsonl");
    let text = bench.text("a", "cells.jsonl");
    std::fs::write(&path, text.replacen("{\"method\"", "{\"meth", 3)).unwrap();
    let e = bench.sweep("a", SMALL, &Fake::default()).unwrap_err().to_string();
    assert!(e.contains("cells.jsonl") && e.contains("line 1"), "{e}");
}

#[test]
fn smaller_budgets_are_replayed_from_the_largest() {
    let bench = Bench::new(2);
    let flags = "--methods plain,best-of-n --budgets 50,100,200,400 --seeds 0..2 --replay";
    let tally = bench.sweep("a", flags, &Fake::default()).unwrap();
    // Plain at four budgets, best-of-n at the largest and, as plain, at the one it cannot pay.
    assert_eq!((tally.ran, tally.remaining), (2 * 2 * (4 + 1 + 1), 0));
    let cells = bench.cells("a");
    let kept = cells.iter().filter(|c| c.candidates.is_some());
    assert!(
        kept.clone().all(|c| c.budget == 400 && c.candidates.as_ref().unwrap()["clip"].len() == 4)
    );
    let mean = |of: &dyn Fn(&[f64]) -> f64| {
        let scores = kept.clone().map(|c| {
            let clip: Vec<f64> =
                c.candidates.as_ref().unwrap()["clip"].iter().map(|s| s.unwrap()).collect();
            of(&clip)
        });
        scores.clone().sum::<f64>() / scores.count() as f64
    };
    let one = mean(&|clip| clip.iter().sum::<f64>() / 4.0);
    let two = mean(&|clip| {
        let pairs = (0..4).flat_map(|a| (0..a).map(move |b| (a, b)));
        pairs.map(|(a, b)| clip[a].max(clip[b])).sum::<f64>() / 6.0
    });
    let mut reader = csv::Reader::from_path(bench.out("a").join("summary.csv")).unwrap();
    let header = reader.headers().unwrap().clone();
    let rows: Vec<csv::StringRecord> = reader.records().map(|row| row.unwrap()).collect();
    let at = |name: &str| header.iter().position(|h| h == name).unwrap();
    let clip = header.iter().position(|h| h.contains("clip")).unwrap();
    for (budget, expected) in [("100", one), ("200", two)] {
        let row = rows
            .iter()
            .find(|r| &r[at("method")] == "best-of-n" && &r[at("budget")] == budget)
            .unwrap_or_else(|| panic!("no row at {budget}"));
        let found: f64 = row[clip].parse().unwrap();
        assert!((found - expected).abs() < 1e-6, "{budget}: {found} is not {expected}");
    }
    // A folder with cells of another kind is not mixed with these.
    let again = bench.sweep("a", flags.trim_end_matches(" --replay"), &Fake::default());
    assert!(again.unwrap_err().to_string().contains("replay"));
    let flags = "--methods best-of-n --reward clip+judge --held-out none --replay";
    let error = bench.sweep("b", flags, &Fake::default()).unwrap_err().to_string();
    assert!(error.starts_with("replay"), "{error}");
}

#[test]
fn adapters_and_parameters_reach_the_request() {
    let bench = Bench::new(1);
    let fake = Fake::default();
    bench.sweep("a", "--methods plain@sharp,best-of-n:kernel=sde --budgets 100", &fake).unwrap();
    let cells = bench.cells("a");
    assert_eq!(cells[0].method, "plain@sharp");
    assert_eq!(cells[1].params["kernel"], "sde");
    let log = fake.log.into_inner().unwrap();
    assert!(log.iter().any(|r| r.adapter.as_deref() == Some("sharp")));
    let refused = |flags: &str| bench.sweep("b", flags, &Fake::default()).unwrap_err().to_string();
    for (flags, wanted) in [
        ("--methods bestof", "known: plain, best-of-n"),
        ("--methods plain@x", "unknown adapter 'x'; known: sharp"),
        ("--model x", "unknown model 'x'; known: fake"),
        ("--reward x", "unknown reward 'x'; known: clip, judge"),
        ("--reward judge --held-out judge", "judge is the searched reward"),
        ("--reference-budget 300", "plain does not run at 300"),
        ("--budgets 100,100", "100 is given twice"),
    ] {
        let e = refused(flags);
        assert!(e.contains(wanted), "{flags}: {e}");
    }
}

#[test]
fn shipped_configurations_parse() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/bench");
    let mut seen = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if std::fs::read_to_string(&path).unwrap().contains("\nmethod = ") {
            continue; // An ablation's: tests/ablation.rs has these.
        }
        let args = Args { config: Some(path.clone()), ..Args::default() };
        let options = args.options().unwrap();
        assert!(options.methods.is_some() && options.budgets.is_some(), "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 2);
}

#[test]
fn files_lie_below_flags_and_unknown_keys_are_errors() {
    let bench = Bench::new(1);
    let file = bench.out("c.toml");
    std::fs::write(&file, "steps = 20\nguidance = 3.0\nseeds = [4, 5]\nprompts = 3\n").unwrap();
    let args = bench.args("a", &format!("--steps 30 --config {}", file.display()));
    let options = args.options().unwrap();
    assert_eq!((options.steps, options.guidance), (Some(30), Some(3.0)));
    assert_eq!(options.seeds.unwrap().0, [4, 5]);
    std::fs::write(&file, "step = 20\n").unwrap();
    let e = Layer::read(&file).unwrap_err().to_string();
    assert!(e.contains("c.toml") && e.contains("unknown field `step`"), "{e}");
}

#[test]
fn a_server_gives_the_same_cells_as_the_engine() {
    let bench = Bench::new(2);
    let flags = "--methods plain,best-of-n --budgets 12,60,300,5000 --limit 7";
    bench.sweep("local", flags, &Fake::default()).unwrap();
    let remote = RemoteBackend::connect(&fake::serve(1), None).unwrap();
    bench.sweep("remote", flags, &remote).unwrap();
    // Without the server's word the step limit is not known in advance.
    let same = |out: &str| values(bench.cells(out)).into_iter().filter(|c| c.budget < 5000).count();
    assert_eq!((same("local"), same("remote")), (6, 6));
    for (a, b) in values(bench.cells("local")).iter().zip(values(bench.cells("remote"))) {
        if a.budget < 5000 {
            let feasible = (&a.method, &a.requested_method, a.f, a.v, &a.scores, &a.params);
            assert_eq!(feasible, (&b.method, &b.requested_method, b.f, b.v, &b.scores, &b.params));
            assert_eq!(a.infeasible.is_some(), b.infeasible.is_some());
        } else {
            assert!(b.infeasible.as_ref().unwrap().contains("must be 1 to 1000"));
        }
    }
}

/// The built program on a server, with `env` set.
fn program(env: &[(&str, &str)], args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_ds-bench"))
        .args(args)
        .envs(env.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_program_runs_on_a_server_with_options_from_all_sources() {
    let bench = Bench::new(2);
    let (url, out, prompts) = (fake::serve(0), bench.out("a"), bench.out("prompts.txt"));
    let file = bench.out("c.toml");
    std::fs::write(&file, "steps = 20\nmin_steps = 5\nbudgets = [40]\n").unwrap();
    let args = [
        "nfe-sweep",
        "--url",
        &url,
        "--out",
        out.to_str().unwrap(),
        "--prompts",
        prompts.to_str().unwrap(),
        "--config",
        file.to_str().unwrap(),
        "--budgets",
        "80",
    ];
    let env = [("DS_BENCH_STEPS", "25"), ("DS_BENCH_BUDGETS", "60")];
    let (code, plan, err) = program(&env, &[&args[..], &["--dry-run"]].concat());
    assert_eq!(code, 0, "{err}");
    assert!(plan.contains("best-of-n at 80: 25 steps, 80 forwards"), "{plan}");
    assert!(!out.exists());
    let (code, _, err) = program(&env, &[&args[..], &["--limit", "3"]].concat());
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("1 cells are left; to resume: ds-bench nfe-sweep --url"), "{err}");
    let (code, _, err) = program(&env, &args);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("1 cells computed") && err.contains("3 were there"), "{err}");
    let cells = bench.cells("a");
    assert!(cells.iter().all(|c| c.budget == 80 && (c.method == "plain" || c.steps == 25)));
    let (code, _, err) = program(&[], &["sweep-merge", out.to_str().unwrap()]);
    assert_eq!(code, 0, "{err}");
}

/// A server that never has room keeps the program waiting for its first cell.
#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_program_with_a_way_to_resume() {
    let bench = Bench::new(1);
    let (url, out, prompts) = (fake::serve(1000), bench.out("a"), bench.out("prompts.txt"));
    let child = Command::new(env!("CARGO_BIN_EXE_ds-bench"))
        .args(["nfe-sweep", "--url", &url, "--out", out.to_str().unwrap()])
        .args(["--prompts", prompts.to_str().unwrap()])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    while !out.join("cells.jsonl").exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(err.contains("4 cells are left; to resume: ds-bench nfe-sweep --url"), "{err}");
    assert!(out.join("summary.md").exists());
}

#[test]
fn the_program_explains_itself_and_its_errors() {
    let (code, help, _) = program(&[], &["nfe-sweep", "--help"]);
    assert_eq!(code, 0);
    for flag in ["--methods", "--held-out", "--shard", "--reference-budget", "DS_BENCH_URL"] {
        assert!(help.contains(flag), "{flag}");
    }
    let (code, _, err) = program(&[], &["nfe-sweep", "--seeds", "3..1"]);
    assert!(code != 0 && err.contains("--seeds"), "{err}");
    let url = "http://127.0.0.1:9";
    let (code, _, err) = program(&[], &["nfe-sweep", "--out", "x", "--url", url]);
    assert!(code != 0 && err.contains(url), "{err}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// However a sweep was killed, the same command completes the same cells.
    #[test]
    fn a_sweep_killed_at_any_byte_resumes(share in 0.0..=1.0f64, garbage in any::<bool>()) {
        let bench = Bench::new(2);
        let flags = "--methods plain,best-of-n --budgets 60,200";
        bench.sweep("whole", flags, &Fake::default()).unwrap();
        let path = bench.out("whole").join("cells.jsonl");
        let mut bytes = std::fs::read(&path).unwrap();
        let whole = values(bench.cells("whole"));
        bytes.truncate((share * bytes.len() as f64).round() as usize);
        let lines = bytes.iter().filter(|&&b| b == b'\n').count();
        if garbage {
            bytes.extend([0, 0, b'\n']);
        }
        std::fs::write(&path, bytes).unwrap();
        let tally = bench.sweep("whole", flags, &Fake::default()).unwrap();
        prop_assert_eq!((tally.kept, tally.ran), (lines, 8 - lines));
        prop_assert_eq!(values(bench.cells("whole")), whole);
    }
}

#[test]
fn costly_budgets_can_have_fewer_prompts() {
    let bench = Bench::new(4);
    let flags = "--methods plain,best-of-n --budgets 100,200,400 --fewer-prompts 400:1 --replay";
    let tally = bench.sweep("a", flags, &Fake::default()).unwrap();
    // Plain at two budgets of four prompts and one of one; best-of-n at each prompt's largest.
    assert_eq!((tally.ran, tally.remaining), (2 * 4 + 1 + 4, 0));
    let mut reader = csv::Reader::from_path(bench.out("a").join("summary.csv")).unwrap();
    let header = reader.headers().unwrap().clone();
    let at = |name: &str| header.iter().position(|h| h == name).unwrap();
    for row in reader.records().map(|row| row.unwrap()) {
        let expected = if &row[at("budget")] == "400" { "1" } else { "4" };
        assert_eq!(&row[at("prompts")], expected, "{row:?}");
    }
    // More of them later.
    let more = flags.replace("400:1", "400:3");
    assert!(bench.sweep("a", &more, &Fake::default()).is_err());
    let tally = bench.sweep("a", &format!("{more} --extend"), &Fake::default()).unwrap();
    assert_eq!((tally.ran, tally.kept), (2 * 2, 2 * 4 + 1 + 2));
}

#[test]
fn budgets_can_be_times() {
    let bench = Bench::new(2);
    // A forward of the fake takes a millisecond, says its meter.
    let flags = "--methods plain,best-of-n --budgets 15,111,299,501 --contract equal-latency";
    let fake = Fake::default();
    let tally = bench.sweep("a", flags, &fake).unwrap();
    assert_eq!((tally.ran, tally.infeasible), (2 * 2 * 4, 2 * 2));
    let spent: BTreeSet<(String, u64, u64)> =
        bench.cells("a").into_iter().map(|c| (c.method, c.budget, c.f)).collect();
    let plain = |budget, f| ("plain".to_owned(), budget, f);
    let searched = |budget, f| ("best-of-n".to_owned(), budget, f);
    for cell in [plain(111, 110), plain(299, 298), plain(501, 500)] {
        assert!(spent.contains(&cell), "{cell:?} is not in {spent:?}");
    }
    for cell in [searched(111, 100), searched(299, 200), searched(501, 500)] {
        assert!(spent.contains(&cell), "{cell:?} is not in {spent:?}");
    }
    let table = bench.text("a", "summary.md");
    assert!(table.contains("| 501 ms |") && table.contains("| Late |"), "{table}");
    assert!(
        table.contains("10 steps of plain sampling cost 0.020 s, the budget is 15 ms"),
        "{table}"
    );
    assert!(bench.text("a", "nfe-sweep.svg").contains("milliseconds per image"));
    // Measured once: two methods and a warm-up, and the cells.
    let calls = |fake: &Fake| fake.calls.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(calls(&fake), 3 + 12);
    let again = Fake::default();
    let tally = bench.sweep("a", flags, &again).unwrap();
    assert_eq!((calls(&again), tally.kept), (0, 16));
    for wrong in [flags.replace("latency", "f"), format!("{flags} --replay")] {
        let error = bench.sweep("a", &wrong, &Fake::default()).unwrap_err().to_string();
        assert!(error.contains("contract") || error.starts_with("replay"), "{error}");
    }
}
