//! Whole trajectories against diffusers' pipeline from the same latents
//! (fixtures: `tools/parity_fixtures.py`), and the parity command.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use common::{assert_names, ids, parity_models, read, relative_error, values};
use diffusion_sharpening::bench::parity::{self, Options, Output};
use diffusion_sharpening::diffusion::config::SchedulerConfig;
use diffusion_sharpening::diffusion::denoiser::{Conditioning, Decoder, Denoiser, TextCond};
use diffusion_sharpening::diffusion::guidance::Guided;
use diffusion_sharpening::diffusion::schedule::NoiseSchedule;
use diffusion_sharpening::diffusion::sdxl_model::SdxlModel;
use diffusion_sharpening::diffusion::solver::{Eval, History, SolverSpec};
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::sdxl::ModelFolder;
use diffusion_sharpening::sdxl::config::{parse_json, read_json};
use diffusion_sharpening::sdxl::weights::write_safetensors;

const BAR: f64 = 1e-4;
const STEPS: usize = 5;
const GUIDANCE: f64 = 5.0;

type Tensors = HashMap<String, Tensor>;

struct Fixture {
    name: String,
    network: Guided<SdxlModel>,
    scheduler: SchedulerConfig,
    reference: Tensors,
}

impl Fixture {
    fn open(folder: &Path) -> Self {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let model = ModelFolder::open(folder, &Placement::cpu(DType::F32)).expect(&name);
        Self {
            name,
            network: Guided(SdxlModel::new(Arc::new(model))),
            scheduler: read_json(&folder.join("scheduler/scheduler_config.json")).unwrap(),
            reference: read(&folder.join("reference.safetensors")),
        }
    }

    fn all() -> Vec<Self> {
        parity_models().iter().map(|folder| Self::open(folder)).collect()
    }

    fn rows(&self) -> usize {
        self.reference["latents"].dim(0).unwrap()
    }

    fn text(&self, states: &Tensor, pooled: &Tensor) -> Vec<TextCond> {
        let sizes: Vec<Vec<f32>> = self.reference["time_ids"].to_vec2().unwrap();
        (0..self.rows())
            .map(|b| TextCond {
                context: states.get(b).unwrap(),
                pooled: pooled.get(b).unwrap(),
                time_ids: sizes[b].clone().try_into().unwrap(),
            })
            .collect()
    }

    fn prompts(&self) -> Vec<TextCond> {
        self.text(&self.reference["hidden_states"], &self.reference["pooled"])
    }

    fn zeros(&self) -> Vec<TextCond> {
        let zeros = |name: &str| self.reference[name].zeros_like().unwrap();
        self.text(&zeros("hidden_states"), &zeros("pooled"))
    }

    fn guided(&self, negative: Vec<TextCond>, guidance_rescale: f64) -> Vec<Conditioning> {
        let pairs = self.prompts().into_iter().zip(negative);
        pairs
            .map(|(positive, negative)| Conditioning {
                positive,
                negative: Some(negative),
                guidance_scale: GUIDANCE,
                guidance_rescale,
            })
            .collect()
    }

    /// [S, B, C, h, w]
    fn run(
        &self,
        config: &SchedulerConfig,
        steps: usize,
        conds: &[Conditioning],
        eta: Option<(f64, &Tensor)>,
    ) -> Tensor {
        let schedule = NoiseSchedule::new(config).unwrap();
        let mut spec = SolverSpec::ode(config.default_solver(), &schedule);
        spec.eta = eta.map_or(0.0, |(eta, _)| eta);
        let solver = spec.build(&schedule, steps).unwrap();
        let conds: Vec<&Conditioning> = conds.iter().collect();
        let latents = self.reference["latents"].narrow(0, 0, conds.len()).unwrap();
        let mut x = latents.affine(solver.init_noise_sigma(), 0.0).unwrap();
        let (mut history, mut states) = (History::default(), Vec::new());
        for step in 0..steps {
            let noise = eta.map(|(_, noise)| noise.get(step).unwrap());
            let mut model = |x: &Tensor, eval: &Eval| {
                let t = Tensor::full(eval.t as f32, conds.len(), x.device())?;
                self.network.predict(x, &t, &conds)
            };
            x = solver.advance(step, &x, &mut history, &mut model, noise.as_ref()).unwrap().x;
            states.push(x.clone());
        }
        Tensor::stack(&states, 0).unwrap()
    }

    /// Compares with the fixture's tensor of that name, if it has one.
    fn compare(&self, what: &str, ours: impl FnOnce(&Tensor) -> Tensor) -> Option<f64> {
        let theirs = self.reference.get(what)?;
        let error = relative_error(&ours(theirs), theirs);
        println!("{:24} {what:20} {error:.2e}", self.name);
        assert!(error < BAR, "{}: {what} differs by {error:.3e}", self.name);
        Some(error)
    }
}

fn cpu() -> Placement {
    Placement::cpu(DType::F32)
}

fn everything(steps: usize, guidance: f64) -> Options {
    Options { only: Vec::new(), steps, guidance }
}

#[test]
fn the_parity_command_agrees_with_diffusers() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    for folder in parity_models() {
        // The reference file holds the inputs under the names that the command takes.
        parity::run(
            &folder,
            &folder.join("reference.safetensors"),
            &out,
            &everything(STEPS, GUIDANCE),
            &cpu(),
            &mut |_| (),
        )
        .unwrap();
        let (ours, theirs) = (read(&out), read(&folder.join("reference.safetensors")));
        assert_eq!(ours.len(), 6);
        for (what, ours) in &ours {
            let error = relative_error(ours, &theirs[what]);
            println!("{:24} {what:14} {error:.2e}", folder.file_name().unwrap().to_string_lossy());
            assert!(error < BAR, "{}: {what} differs by {error:.3e}", folder.display());
        }
    }
}

#[test]
fn trajectories_in_every_mode() {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for fixture in Fixture::all() {
        let scheduler = &fixture.scheduler;
        let mut count = |what: &'static str, error: Option<f64>| {
            *counts.entry(what).or_default() += usize::from(error.is_some());
        };
        let error = fixture.compare("trajectory_rescale", |_| {
            fixture.run(scheduler, STEPS, &fixture.guided(fixture.zeros(), 0.7), None)
        });
        count("rescale", error);
        let error = fixture.compare("trajectory_plain", |_| {
            let conds: Vec<_> = fixture.prompts().into_iter().map(Conditioning::plain).collect();
            fixture.run(scheduler, STEPS, &conds, None)
        });
        count("plain", error);
        let error = fixture.compare("trajectory_negative", |_| {
            let rows = |name: &str| ids(&fixture.reference[name]);
            let folder = fixture.network.0.folder();
            let encoded = folder
                .encode_ids(&rows("negative_input_ids"), &rows("negative_input_ids_2"))
                .unwrap();
            fixture.compare("negative_hidden_states", |_| encoded.context.clone());
            fixture.compare("negative_pooled", |_| encoded.pooled.clone());
            let negative = fixture.text(&encoded.context, &encoded.pooled);
            fixture.run(scheduler, STEPS, &fixture.guided(negative, 0.0), None)
        });
        count("negative", error);
        let error = fixture.compare("trajectory_eta", |_| {
            let noise = Some((1.0, &fixture.reference["noise_eta"]));
            fixture.run(scheduler, STEPS, &fixture.guided(fixture.zeros(), 0.0), noise)
        });
        count("eta", error);
    }
    let expected = [("eta", 2), ("negative", 4), ("plain", 3), ("rescale", 3)];
    assert_eq!(counts, BTreeMap::from(expected));
}

/// From prompt strings to pixels, with the checkpoint's own null prompt.
#[test]
fn prompts_to_images() {
    let mut checked = 0;
    for folder in parity_models() {
        let text = std::fs::read_to_string(folder.join("reference.json")).unwrap();
        let facts: serde_json::Value = parse_json(&text).unwrap();
        let Some(prompts) = facts["prompts"].as_array() else { continue };
        let prompts: Vec<&str> = prompts.iter().map(|p| p.as_str().unwrap()).collect();
        let fixture = Fixture::open(&folder);
        let model = &fixture.network.0;
        let tokenizers = model.folder().tokenizers().unwrap();
        let sizes: Vec<Vec<f32>> = fixture.reference["time_ids"].to_vec2().unwrap();
        let encoded = model.encode(&tokenizers, &prompts, (64, 64)).unwrap();
        let null = model.null(&tokenizers, (64, 64)).unwrap();
        let zeros = values(&null.context).iter().all(|v| *v == 0.0);
        assert_eq!(zeros, model.folder().force_zeros_for_empty_prompt);
        let conds: Vec<Conditioning> = (encoded.into_iter().zip(sizes))
            .map(|(text, sizes)| {
                let time_ids = sizes.try_into().unwrap();
                Conditioning {
                    positive: TextCond { time_ids, ..text },
                    negative: Some(TextCond { time_ids, ..null.clone() }),
                    guidance_scale: GUIDANCE,
                    guidance_rescale: 0.0,
                }
            })
            .collect();
        let states = fixture.run(&fixture.scheduler, STEPS, &conds, None);
        fixture.compare("trajectory_text", |_| states.clone()).unwrap();
        let last = states.get(STEPS - 1).unwrap();
        fixture.compare("images", |_| {
            let decoded = model.folder().vae.decode(&last).unwrap();
            ((decoded / 2.0).unwrap() + 0.5).unwrap().clamp(0.0, 1.0).unwrap()
        });
        let theirs = &fixture.reference["images"];
        let (_, _, height, width) = theirs.dims4().unwrap();
        let theirs: Vec<Vec<f32>> = theirs.flatten_from(1).unwrap().to_vec2().unwrap();
        for (image, theirs) in model.decode(&last).unwrap().iter().zip(theirs) {
            assert_eq!(image.dimensions(), (width as u32, height as u32));
            for (x, y, pixel) in image.enumerate_pixels() {
                for (c, ours) in pixel.0.into_iter().enumerate() {
                    let at = c * height * width + y as usize * width + x as usize;
                    let expected = theirs[at] * 255.0;
                    assert!((f32::from(ours) - expected).abs() < 0.51, "pixel {x},{y},{c}");
                }
            }
        }
        checked += 1;
    }
    assert_eq!(checked, 2);
}

/// More scheduler configurations with one small U-Net.
#[test]
fn every_supported_scheduler_configuration() {
    let folder = parity_models().into_iter().find(|f| f.ends_with("ddim_tiny")).unwrap();
    let text = std::fs::read_to_string(folder.join("schedulers.json")).unwrap();
    let listing: BTreeMap<String, serde_json::Value> = parse_json(&text).unwrap();
    let theirs = read(&folder.join("schedulers.safetensors"));
    let fixture = Fixture::open(&folder);
    let conds = &fixture.guided(fixture.zeros(), 0.0)[..1];
    let (mut ran, mut refused, mut worst) = (0, Vec::new(), 0.0_f64);
    for (name, facts) in &listing {
        let config: SchedulerConfig = serde_json::from_value(facts["config"].clone()).unwrap();
        if let Err(error) = config.validate() {
            refused.push(format!("{name}: {error}"));
            continue;
        }
        let steps = facts["steps"].as_u64().unwrap() as usize;
        let ours = fixture.run(&config, steps, conds, None);
        let error = relative_error(&ours, &theirs[name]);
        println!("{name:24} {error:.2e}");
        assert!(error < BAR, "{name} differs by {error:.3e}");
        worst = worst.max(error);
        ran += 1;
    }
    println!("{ran} ran, worst {worst:.2e}; refused: {refused:#?}");
    assert!(ran >= 15, "only {ran} ran");
    assert_eq!(refused.len(), 5, "{refused:?}");
}

/// What would silently give other images is refused by name.
#[test]
fn unsupported_scheduler_options_are_named() {
    for (key, value) in [
        ("use_exponential_sigmas", "true"),
        ("use_beta_sigmas", "true"),
        ("use_lu_lambdas", "true"),
        ("use_flow_sigmas", "true"),
        ("euler_at_final", "true"),
        ("lower_order_final", "false"),
        ("lambda_min_clipped", "-5.1"),
        ("variance_type", "\"learned\""),
        ("timestep_type", "\"continuous\""),
        ("clip_sample", "true"),
        ("interpolation_type", "\"log_linear\""),
    ] {
        let config: SchedulerConfig = parse_json(&format!("{{\"{key}\": {value}}}")).unwrap();
        assert_names(&config.validate().unwrap_err().to_string(), &[key]);
    }
    let text = r#"{"lambda_min_clipped": -Infinity, "sigma_max": NaN, "_class_name": "a \"-Infinity\" NaN"}"#;
    let config: SchedulerConfig = parse_json(text).unwrap();
    config.validate().unwrap();
    assert!(parse_json::<SchedulerConfig>("{} {}").is_err());
    assert_eq!(config.class_name.as_deref(), Some("a \"-Infinity\" NaN"));
}

#[test]
fn the_parity_command_names_what_is_wrong() {
    let folder = parity_models().into_iter().find(|f| f.ends_with("ddim_tiny")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let inputs = ["latents", "timesteps", "input_ids", "input_ids_2", "time_ids", "image"];
    let reference = read(&folder.join("reference.safetensors"));
    let good: BTreeMap<String, Tensor> =
        inputs.iter().map(|name| ((*name).to_owned(), reference[*name].clone())).collect();
    let run = |tensors: &BTreeMap<String, Tensor>| -> Result<(), String> {
        write_safetensors(&file, tensors, None).unwrap();
        parity::run(&folder, &file, &out, &everything(1, 1.0), &cpu(), &mut |_| ())
            .map_err(|e| e.to_string())
    };
    run(&good).unwrap();
    for name in inputs {
        let mut tensors = good.clone();
        let tensor = tensors.remove(name).unwrap();
        assert_names(&run(&tensors).unwrap_err(), &["in.safetensors", name, "lacks"]);
        tensors.insert(name.into(), tensor.unsqueeze(0).unwrap());
        assert_names(&run(&tensors).unwrap_err(), &["in.safetensors", name, "dimensions"]);
        if name != "image" {
            tensors.insert(name.into(), tensor.narrow(0, 0, 1).unwrap());
            let rows = if name == "latents" { "2 rows for 1" } else { name };
            assert_names(&run(&tensors).unwrap_err(), &["in.safetensors", rows, "rows"]);
        }
    }
    for (name, value, parts) in [
        ("input_ids", Tensor::full(9_999_i64, (2, 24), &Device::Cpu), ["token ids", "9999"]),
        ("input_ids", Tensor::full(-1_i64, (2, 24), &Device::Cpu), ["input_ids", "-1"]),
        ("input_ids_2", good["input_ids_2"].narrow(1, 0, 20), ["input_ids_2", "20"]),
        ("input_ids", Tensor::zeros((2, 25), DType::I64, &Device::Cpu), ["input_ids", "25"]),
        ("time_ids", good["time_ids"].narrow(1, 0, 5), ["time_ids", "6"]),
        ("latents", good["latents"].narrow(1, 0, 3), ["latents", "4"]),
    ] {
        let mut tensors = good.clone();
        tensors.insert(name.into(), value.unwrap().contiguous().unwrap());
        assert_names(&run(&tensors).unwrap_err(), &parts);
    }
    let nowhere = dir.path().join("no-model");
    let error = parity::run(&nowhere, &file, &out, &everything(1, 1.0), &cpu(), &mut |_| ())
        .unwrap_err()
        .to_string();
    assert_names(&error, &["no-model", "model_index.json"]);
    let nothing = dir.path().join("no-inputs.safetensors");
    let error = parity::run(&folder, &nothing, &out, &everything(1, 1.0), &cpu(), &mut |_| ())
        .unwrap_err()
        .to_string();
    assert_names(&error, &["no-inputs.safetensors"]);
}

/// One output needs its own inputs only, and no steps mean no trajectory.
#[test]
fn the_parity_command_computes_what_is_asked_for() {
    let folder = parity_models().into_iter().find(|f| f.ends_with("ddim_tiny")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let reference = read(&folder.join("reference.safetensors"));
    let run = |only: &[Output], steps: usize, inputs: &[&str]| {
        let kept: BTreeMap<String, Tensor> =
            inputs.iter().map(|name| ((*name).to_owned(), reference[*name].clone())).collect();
        write_safetensors(&file, &kept, None).unwrap();
        let options = Options { only: only.to_vec(), steps, guidance: GUIDANCE };
        let mut stages = Vec::new();
        let mut report = |stage: &parity::Stage| stages.push(stage.stage);
        parity::run(&folder, &file, &out, &options, &cpu(), &mut report)?;
        let computed = read(&out);
        for (name, values) in &computed {
            let error = relative_error(values, &reference[name]);
            assert!(error < BAR, "{name} differs by {error:.3e}");
        }
        let mut names: Vec<String> = computed.into_keys().collect();
        names.sort();
        Ok::<_, diffusion_sharpening::Error>((names.join(" "), stages.join(" ")))
    };
    let text = ["input_ids", "input_ids_2"];
    let network = ["input_ids", "input_ids_2", "latents", "timesteps", "time_ids"];
    for (only, inputs, names, stages) in [
        (&[Output::Pooled][..], &text[..], "pooled", "load text"),
        (&[Output::EncodedMean], &["image"], "encoded_mean", "load encoded_mean"),
        (&[Output::Decoded], &["latents"], "decoded", "load decoded"),
        (
            &[Output::NoisePred, Output::HiddenStates],
            &network,
            "hidden_states noise_pred",
            "load text noise_pred",
        ),
        (
            &[],
            &[&network[..], &["image"]].concat(),
            "decoded encoded_mean hidden_states noise_pred pooled",
            "load text noise_pred decoded encoded_mean",
        ),
    ] {
        let got = run(only, 0, inputs).unwrap();
        assert_eq!((got.0.as_str(), got.1.as_str()), (names, stages));
    }
    let (names, stages) = run(&[Output::Trajectory], STEPS, &network).unwrap();
    assert_eq!((names.as_str(), stages.as_str()), ("trajectory", "load text trajectory"));
    let error = run(&[Output::Trajectory], 0, &network).unwrap_err().to_string();
    assert_names(&error, &["steps", "at least 1"]);
}
