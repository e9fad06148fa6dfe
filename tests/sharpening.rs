//! Diffusion-Sharpening's update against a plain implementation of the same mathematics, and its
//! parts on models with a closed-form answer.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use common::{normal, relative_error, values};
use diffusion_sharpening::diffusion::cost::Budget;
use diffusion_sharpening::diffusion::ddim::Transition;
use diffusion_sharpening::diffusion::denoiser::{Conditioning, Decoder, Denoiser, TextCond};
use diffusion_sharpening::diffusion::guidance::Guided;
use diffusion_sharpening::diffusion::meter::{Meter, MeteredDenoiser};
use diffusion_sharpening::diffusion::noise::{NoiseKey, Purpose};
use diffusion_sharpening::diffusion::schedule::NoiseSchedule;
use diffusion_sharpening::diffusion::sdxl_model::SdxlModel;
use diffusion_sharpening::nn::device::Placement;
use diffusion_sharpening::rewards::{RewardSet, registry};
use diffusion_sharpening::sdxl::{ModelFolder, UNet};
use diffusion_sharpening::train::dry_run::UpdateCost;
use diffusion_sharpening::train::objective::LossKind;
use diffusion_sharpening::train::optimizer::{Gradients, Missing};
use diffusion_sharpening::train::pass::Policy;
use diffusion_sharpening::train::score::Scorer;
use diffusion_sharpening::train::settings::{
    Aggregate, ChainGrad, Method, ReferenceStates, Renoise, RewardScale, Score, Select, Settings,
    Target,
};
use diffusion_sharpening::train::sharpen::{
    Chain, Group, Models, Report, Row, Sharpening, Start, starts,
};
use diffusion_sharpening::train::texts;
use diffusion_sharpening::train::trainable::Trainable;
use diffusion_sharpening::util::CancelToken;

const PROMPTS: [&str; 2] = ["a red circle", "two green stars"];

struct Model {
    folder: Arc<ModelFolder>,
    base: Guided<SdxlModel>,
    rewards: RewardSet,
    schedule: NoiseSchedule,
    texts: Vec<TextCond>,
    null: TextCond,
}

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
        let folder = ModelFolder::open(&path, &Placement::cpu(DType::F32)).unwrap();
        let folder = Arc::new(folder);
        let base = SdxlModel::new(folder.clone());
        let tokenizers = folder.tokenizers().unwrap();
        Model {
            texts: base.encode(&tokenizers, &PROMPTS, (64, 64)).unwrap(),
            null: base.null(&tokenizers, (64, 64)).unwrap(),
            schedule: NoiseSchedule::new(&folder.scheduler().unwrap()).unwrap(),
            rewards: registry::for_model(&path).unwrap(),
            base: Guided(base),
            folder,
        }
    })
}

/// An adapter that does something, of few modules.
fn trainable(settings: &Settings) -> Trainable {
    let trainable = Trainable::new(&model().folder, settings).unwrap();
    for (i, (name, var)) in trainable.vars.iter().enumerate() {
        if name.ends_with(".up") {
            let values = normal(i as u64, var.dims()).to_dtype(DType::F32).unwrap();
            var.set(&(values * 0.02).unwrap()).unwrap();
        }
    }
    trainable
}

/// A method and what its settings differ in.
type Case = (Method, fn(&mut Settings));

fn settings(method: Method) -> Settings {
    Settings {
        seed: 5,
        batch: 2,
        micro: 1,
        n: 3,
        m: 3,
        rank: 4,
        targets: vec!["to_q".into(), "ff.net.2".into()],
        rewards: vec!["scene-clip".into()],
        reward_scale: RewardScale::None,
        score: Score::Chain,
        renoise: Renoise::FreshIndep,
        chain_guidance: 1.0,
        t_min: 0,
        t_max: 999,
        beta: 200.0,
        gamma: 30.0,
        reward_eta: 10.0,
        ..Settings::from(method)
    }
}

/// Two prompts with clean latents that differ from trajectory to trajectory.
fn groups(n: usize) -> Vec<Group> {
    let clean = |seed: u64| normal(seed, &[n, 4, 16, 16]).to_dtype(DType::F32).unwrap();
    let group = |i: usize| Group {
        prompt: PROMPTS[i].to_owned(),
        text: model().texts[i].clone(),
        clean: clean(10 + i as u64),
        noise: Some(clean(20 + i as u64)),
        scores: None,
    };
    vec![group(0), group(1)]
}

struct Done {
    report: Report,
    gradients: BTreeMap<String, Tensor>,
    meter: Arc<Meter>,
}

/// The update of the library.
fn update(method: Method, settings: &Settings, trainable: &Trainable) -> Done {
    let model = model();
    let snapshot = trainable.snapshot(&model.folder).unwrap();
    let actor = Guided(model.base.0.with_unet(snapshot));
    let unet = trainable.policy(&model.folder, settings.recompute).unwrap();
    let mut gradients = Gradients::new(&trainable.vars, Missing::Allow).unwrap();
    let meter = Meter::new(Budget::default());
    let cancel = CancelToken::default();
    let models = Models { actor: &actor, reference: &model.base, meter: &meter, cancel: &cancel };
    let mut scorer = Scorer::new(&model.rewards, settings).unwrap();
    let sharpening =
        Sharpening { method, settings, schedule: &model.schedule, null: model.null.clone() };
    let mut policy = Policy { unet: &unet, gradients: &mut gradients, meter: &meter };
    let groups = groups(settings.n);
    let report = sharpening.update(7, &groups, models, &mut scorer, &mut policy).unwrap();
    let found = trainable.vars.keys().map(|name| {
        (name.clone(), gradients.get(name).unwrap().unwrap_or_else(|| panic!("no {name}")))
    });
    Done { report, gradients: found.collect(), meter }
}

/// One prediction with its graph.
fn predict(unet: &UNet, x: &Tensor, t: f64, text: &TextCond) -> Tensor {
    let [context, pooled, sizes] = texts::rows(&[text]).unwrap();
    let t = Tensor::new(&[t as f32], &Device::Cpu).unwrap();
    unet.forward(x, &t, &context, &pooled, &sizes).unwrap()
}

fn scalar(x: &Tensor) -> f64 {
    x.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

/// The same update, one trajectory after the other, everything with a graph, and the loss as the
/// papers write it. Gradients include the anchor's, the loss does not.
fn plain(method: Method, s: &Settings, trainable: &Trainable) -> (GradStore, f64) {
    let model = model();
    let unet = trainable.policy(&model.folder, false).unwrap();
    let base = &model.folder.unet;
    let starts = starts(&model.schedule, s, 7, 2).unwrap();
    let (mut losses, mut held) = (Vec::new(), Vec::new());
    for (g, (group, start)) in groups(s.n).iter().zip(&starts).enumerate() {
        let text = &model.texts[g];
        let (mut scores, mut policy, mut reference) = (Vec::new(), Vec::new(), Vec::new());
        let mut apart = Vec::new();
        for i in 0..s.n {
            let clean = group.clean.narrow(0, i, 1).unwrap();
            let shape = (4, 16, 16);
            let noise = match s.renoise {
                Renoise::FreshIndep => {
                    start.key.normal(Purpose::Renoise, 0, i as u64, shape, &Device::Cpu)
                }
                Renoise::FreshShared => {
                    start.key.normal(Purpose::Renoise, 0, 0, shape, &Device::Cpu)
                }
                Renoise::Reuse => Ok(group.noise.as_ref().unwrap().get(i).unwrap()),
            };
            let noise = noise.unwrap().unsqueeze(0).unwrap();
            let mut x = model.schedule.add_noise(&clean, &noise, &[start.t]).unwrap();
            let (mut reward, mut loss, mut loss_ref) = (0.0, Vec::new(), Vec::new());
            let mut distance = Vec::new();
            for k in 0..start.states {
                let t = start.t - 40.0 * k as f64;
                let input = match s.chain_grad {
                    ChainGrad::Through => x.clone(),
                    ChainGrad::Detach => x.detach(),
                };
                let output = predict(&unet, &input, t, text);
                let abar = model.schedule.abar(t);
                let target = match s.target {
                    Target::EpsInit => noise.clone(),
                    Target::EpsExact => {
                        let signal = (&clean * abar.sqrt()).unwrap();
                        ((&x - signal).unwrap() / (1.0 - abar).sqrt()).unwrap().detach()
                    }
                };
                let error = |e: &Tensor| (e - &target).unwrap().sqr().unwrap().mean_all().unwrap();
                let guided = |unet: &UNet, output: &Tensor| {
                    if s.loss_guidance == 1.0 {
                        return output.clone();
                    }
                    let null = predict(unet, &input, t, &model.null);
                    (&null + ((output - &null).unwrap() * s.loss_guidance).unwrap()).unwrap()
                };
                let compared = guided(&unet, &output);
                loss.push(error(&compared));
                let there = guided(base, &predict(base, &input.detach(), t, text)).detach();
                let change = (&compared - &there).unwrap().sqr().unwrap();
                distance.push(change.mean_all().unwrap());
                if s.reference_states == ReferenceStates::All || k == 0 {
                    loss_ref.push(scalar(&error(&there)));
                }
                let mixed = if s.chain_guidance == 1.0 {
                    output
                } else {
                    let null = predict(&unet, &input, t, &model.null);
                    (&null + ((output - &null).unwrap() * s.chain_guidance).unwrap()).unwrap()
                };
                let step = Transition::new(&model.schedule, &[t], &[t - 40.0], 0.0).unwrap();
                let (x0, eps) = step.x0_eps(&input, &mixed).unwrap();
                let images = model.base.0.decode(&x0.detach()).unwrap();
                let prompts = [PROMPTS[g]];
                reward += model.rewards.score(&images, &prompts).unwrap()["scene-clip"][0];
                x = step.mean(&x0, &eps).unwrap();
            }
            let count = start.states as f64;
            scores.push(reward / if s.aggregate == Aggregate::Sum { 1.0 } else { count });
            apart.push((Tensor::stack(&distance, 0).unwrap().sum_all().unwrap() / count).unwrap());
            policy.push((Tensor::stack(&loss, 0).unwrap().sum_all().unwrap() / count).unwrap());
            reference.push(loss_ref.iter().sum::<f64>() / loss_ref.len() as f64);
        }
        let order = |sign: f64| {
            let by = |a: &usize, b: &usize| (sign * scores[*a]).total_cmp(&(sign * scores[*b]));
            (0..s.n).min_by(by).unwrap()
        };
        let (w, l) = (order(-1.0), order(1.0));
        assert!(scores[w] - scores[l] > 1e-3, "the group has no preference");
        if method == Method::Sft {
            losses.push(policy[w].clone());
            continue;
        }
        held.push(((&apart[w] + &apart[l]).unwrap() * s.anchor).unwrap());
        let gain = |j: usize| (policy[j].neg().unwrap() + reference[j]).unwrap();
        let margin = ((gain(w) - gain(l)).unwrap() * s.beta).unwrap();
        let gap = scores[w] - scores[l];
        let minus_log_sigmoid = |x: Tensor| (x.neg().unwrap().exp().unwrap() + 1.0).unwrap().log();
        losses.push(match s.loss {
            LossKind::Dpo => minus_log_sigmoid(margin).unwrap(),
            LossKind::Offset => minus_log_sigmoid((margin - s.gamma * gap).unwrap()).unwrap(),
            LossKind::Rebel => (margin - s.reward_eta * gap).unwrap().sqr().unwrap(),
        });
    }
    let mean =
        |terms: &[Tensor]| (Tensor::stack(terms, 0).unwrap().sum_all().unwrap() / 2.0).unwrap();
    let loss = mean(&losses);
    let all = if held.is_empty() { loss.clone() } else { (&loss + mean(&held)).unwrap() };
    (all.backward().unwrap(), scalar(&loss))
}

fn compare(what: &str, method: Method, settings: &Settings) {
    settings.check(method).unwrap_or_else(|e| panic!("{what}: {e}"));
    let trainable = trainable(settings);
    let done = update(method, settings, &trainable);
    assert_eq!(done.report.used, 2, "{what}: {:?}", done.report.skipped);
    let (expected, loss) = plain(method, settings, &trainable);
    let found = done.report.means["loss"];
    assert!((found - loss).abs() <= 1e-3 * loss.abs(), "{what}: loss {found}, expected {loss}");
    let mut dot = [0.0; 3];
    for (name, var) in &trainable.vars {
        let (a, b) = (values(&done.gradients[name]), values(expected.get(var).unwrap()));
        for (a, b) in a.iter().zip(&b) {
            dot[0] += a * b;
            dot[1] += a * a;
            dot[2] += b * b;
        }
    }
    let (cosine, ratio) = (dot[0] / (dot[1] * dot[2]).sqrt(), (dot[1] / dot[2]).sqrt());
    println!("{what}: cosine {cosine:.8}, ratio {ratio:.6}, loss {loss:.6}");
    assert!(cosine > 0.9999 && (ratio - 1.0).abs() < 2e-3, "{what}: {cosine}, {ratio}");
}

#[test]
fn updates_are_those_of_a_plain_implementation() {
    use Method::{Rlhf, Sft};
    let with = |method, change: fn(&mut Settings)| {
        let mut settings = settings(method);
        change(&mut settings);
        settings
    };
    compare("sft", Sft, &with(Sft, |_| {}));
    compare(
        "sft, eps-init, sum",
        Sft,
        &with(Sft, |s| {
            (s.target, s.aggregate) = (Target::EpsInit, Aggregate::Sum);
        }),
    );
    compare("rlhf, dpo", Rlhf, &with(Rlhf, |s| s.loss = LossKind::Dpo));
    compare(
        "rlhf, offset, shared noise, both groups at once",
        Rlhf,
        &with(Rlhf, |s| {
            (s.loss, s.renoise, s.micro) = (LossKind::Offset, Renoise::FreshShared, 2);
        }),
    );
    compare(
        "rlhf, rebel, recomputed",
        Rlhf,
        &with(Rlhf, |s| {
            (s.loss, s.recompute) = (LossKind::Rebel, true);
        }),
    );
    compare(
        "rlhf, through the chain, guided",
        Rlhf,
        &with(Rlhf, |s| {
            (s.chain_grad, s.chain_guidance) = (ChainGrad::Through, 3.0);
        }),
    );
    compare(
        "rlhf, held to the reference",
        Rlhf,
        &with(Rlhf, |s| {
            (s.anchor, s.chain_guidance) = (3000.0, 2.0);
        }),
    );
    compare(
        "rlhf, guided in the loss",
        Rlhf,
        &with(Rlhf, |s| {
            (s.anchor, s.loss_guidance, s.micro) = (500.0, 4.0, 2);
        }),
    );
    compare(
        "rlhf, as the released code",
        Rlhf,
        &with(Rlhf, |s| {
            (s.chain_grad, s.target) = (ChainGrad::Through, Target::EpsInit);
            (s.renoise, s.reference_states) = (Renoise::Reuse, ReferenceStates::First);
        }),
    );
}

#[test]
fn the_model_that_is_its_reference_has_the_loss_of_no_preference() {
    let settings = Settings { loss: LossKind::Dpo, ..settings(Method::Rlhf) };
    let fresh = Trainable::new(&model().folder, &settings).unwrap();
    let report = update(Method::Rlhf, &settings, &fresh).report;
    assert!((report.means["loss"] - 2f64.ln()).abs() < 1e-4, "{}", report.means["loss"]);
    assert!(report.means["delta"].abs() < 1e-6 && report.means["kl"] < 1e-6);
}

#[test]
fn costs_are_as_planned() {
    let cases: [Case; 5] = [
        (Method::Sft, |_| {}),
        (Method::Rlhf, |s| s.loss_guidance = 4.0),
        (Method::Rlhf, |s| s.chain_guidance = 4.0),
        (Method::Rlhf, |s| s.estimate_steps = 3),
        (Method::Rlhf, |s| (s.chain_grad, s.chain_guidance) = (ChainGrad::Through, 2.0)),
    ];
    for (method, change) in cases {
        let mut settings = settings(method);
        change(&mut settings);
        // One timestep: the mean is what happens.
        (settings.t_min, settings.t_max) = (500, 500);
        let done = update(method, &settings, &trainable(&settings));
        let planned = UpdateCost::of(method, &settings, &model().schedule).unwrap();
        let spent = done.meter.spent();
        // Generating is not part of the update.
        assert_eq!(spent.f as f64, planned.forwards() - planned.rollout, "{method:?}");
        assert_eq!((spent.y, spent.v), (planned.images as u64, planned.images as u64));
        assert_eq!(done.report.policy_passes as f64, planned.backward);
    }
}

/// All scores equal: nothing is learnt, and it is counted.
#[test]
fn groups_without_a_preference_are_counted_and_left_out() {
    let settings = Settings { min_gap: 1e6, ..settings(Method::Rlhf) };
    let trainable = Trainable::new(&model().folder, &settings).unwrap();
    let unet = trainable.policy(&model().folder, false).unwrap();
    let mut gradients = Gradients::new(&trainable.vars, Missing::Allow).unwrap();
    let meter = Meter::new(Budget::default());
    let cancel = CancelToken::default();
    let base = &model().base;
    let models = Models { actor: base, reference: base, meter: &meter, cancel: &cancel };
    let mut scorer = Scorer::new(&model().rewards, &settings).unwrap();
    let sharpening = Sharpening {
        method: Method::Rlhf,
        settings: &settings,
        schedule: &model().schedule,
        null: model().null.clone(),
    };
    let mut policy = Policy { unet: &unet, gradients: &mut gradients, meter: &meter };
    let report = sharpening.update(0, &groups(3), models, &mut scorer, &mut policy).unwrap();
    assert_eq!((report.used, report.skipped["small_gap"]), (0, 2));
    assert!(gradients.is_empty());
}

/// The control: the same groups and scores, dealt out anew within each group.
#[test]
fn random_selection_learns_from_other_trajectories() {
    let best = settings(Method::Rlhf);
    let random = Settings { select: Select::Random, ..best.clone() };
    let trainable = trainable(&best);
    let (a, b) =
        (update(Method::Rlhf, &best, &trainable), update(Method::Rlhf, &random, &trainable));
    assert_eq!(a.report.means["gap"], b.report.means["gap"], "the same scores");
    let same = trainable
        .vars
        .keys()
        .all(|name| relative_error(&b.gradients[name], &a.gradients[name]) < 1e-3);
    assert!(!same, "shuffled scores chose the same pairs");
}

/// Answers with the noise between the state and one clean latent.
struct Oracle {
    schedule: NoiseSchedule,
    clean: Tensor,
}

impl Denoiser for Oracle {
    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn latent_shape(
        &self,
        width: u32,
        height: u32,
    ) -> diffusion_sharpening::Result<(usize, usize, usize)> {
        Ok((4, height as usize, width as usize))
    }

    fn predict(
        &self,
        x: &Tensor,
        t: &Tensor,
        _: &[&Conditioning],
    ) -> diffusion_sharpening::Result<Tensor> {
        let rows = t.to_vec1::<f32>()?.into_iter().enumerate().map(|(i, t)| {
            let abar = self.schedule.abar(f64::from(t));
            let signal = (&self.clean * abar.sqrt())?;
            (x.get(i)? - signal)? / (1.0 - abar).sqrt()
        });
        Ok(Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }
}

#[test]
fn chains_of_a_perfect_model_see_the_clean_latent_at_every_state() {
    let schedule = NoiseSchedule::sdxl().unwrap();
    let clean = normal(1, &[4, 8, 8]).to_dtype(DType::F32).unwrap();
    let oracle = Oracle { schedule: schedule.clone(), clean: clean.clone() };
    let cond = Conditioning::plain(model().texts[0].clone());
    let start = |t: f64, states| Start { key: NoiseKey::new(3), t, states };
    let rows: Vec<Row> = [start(900.0, 4), start(70.0, 2), start(20.0, 1)]
        .into_iter()
        .map(|start| Row { start, candidate: 0, cond: &cond })
        .collect();
    let t: Vec<f64> = rows.iter().map(|row| row.start.t).collect();
    let three = Tensor::stack(&[&clean, &clean, &clean], 0).unwrap();
    let noise = normal(2, &[3, 4, 8, 8]).to_dtype(DType::F32).unwrap();
    let x = schedule.add_noise(&three, &noise, &t).unwrap();
    for (eta, estimate_steps) in [(0.0, 1), (1.0, 1), (0.0, 5)] {
        let meter = Meter::new(Budget::default());
        let cancel = CancelToken::default();
        let chain = Chain {
            denoiser: MeteredDenoiser::new(&oracle, &meter),
            schedule: &schedule,
            stride: 40.0,
            eta,
            estimate_steps,
            micro_batch: 2,
            cancel: &cancel,
        };
        let levels = chain.roll(&x, &rows, true).unwrap();
        let shape: Vec<Vec<usize>> = levels.iter().map(|level| level.rows.clone()).collect();
        assert_eq!(shape, [vec![0, 1, 2], vec![0, 1], vec![0], vec![0]]);
        for level in &levels {
            let estimates = level.x0.as_ref().unwrap();
            for i in 0..level.rows.len() {
                let error = relative_error(&estimates.get(i).unwrap(), &clean);
                assert!(error < 2e-4, "eta {eta}, t {}: {error}", level.t[i]);
            }
        }
        assert_eq!(meter.spent().f, chain.cost(&rows, true), "as planned");
    }
}

/// Rows with a timestep each are what each is alone.
#[test]
fn rows_of_a_chain_do_not_depend_on_each_other() {
    let model = model();
    let cond: Vec<Conditioning> = model
        .texts
        .iter()
        .map(|text| Conditioning {
            positive: text.clone(),
            negative: Some(model.null.clone()),
            guidance_scale: 5.0,
            guidance_rescale: 0.0,
        })
        .collect();
    let start = |t: f64, states| Start { key: NoiseKey::new(t as u64), t, states };
    let rows = [
        Row { start: start(700.0, 3), candidate: 0, cond: &cond[0] },
        Row { start: start(30.0, 1), candidate: 1, cond: &cond[1] },
        Row { start: start(55.0, 2), candidate: 2, cond: &cond[0] },
    ];
    let x = normal(9, &[3, 4, 16, 16]).to_dtype(DType::F32).unwrap();
    let cancel = CancelToken::default();
    let meter = Meter::new(Budget::default());
    let chain = |micro_batch| Chain {
        denoiser: MeteredDenoiser::new(&model.base, &meter),
        schedule: &model.schedule,
        stride: 40.0,
        eta: 0.5,
        estimate_steps: 2,
        micro_batch,
        cancel: &cancel,
    };
    let all = chain(8).roll(&x, &rows, true).unwrap();
    for (i, row) in rows.iter().enumerate() {
        let one = chain(1).roll(&x.narrow(0, i, 1).unwrap(), &[*row], true).unwrap();
        assert_eq!(one.len(), row.start.states);
        for (k, level) in one.iter().enumerate() {
            let at = all[k].rows.iter().position(|r| *r == i).unwrap();
            let state = relative_error(&all[k].x.get(at).unwrap(), &level.x.get(0).unwrap());
            let x0 = |l: &diffusion_sharpening::train::sharpen::Level, j: usize| {
                l.x0.as_ref().unwrap().get(j).unwrap()
            };
            let estimate = relative_error(&x0(&all[k], at), &x0(level, 0));
            assert!(state < 1e-5 && estimate < 1e-5, "row {i}, state {k}: {state}, {estimate}");
        }
    }
}

#[test]
fn variables_of_full_fine_tuning_are_the_checkpoint() {
    let settings = Settings {
        train: diffusion_sharpening::train::settings::Trained::Full,
        ..settings(Method::Sft)
    };
    let trainable = Trainable::new(&model().folder, &settings).unwrap();
    assert_eq!(trainable.parameters(), model().folder.unet_weights.parameters());
    let x = normal(3, &[1, 4, 16, 16]).to_dtype(DType::F32).unwrap();
    let snapshot = trainable.snapshot(&model().folder).unwrap();
    let of = |unet: &UNet| predict(unet, &x, 300.0, &model().texts[0]);
    assert!(relative_error(&of(&snapshot), &of(&model().folder.unet)) < 1e-6);
    // A change of the variables is one of the policy, not of the base.
    let policy = trainable.policy(&model().folder, false).unwrap();
    let var: &Var = &trainable.vars["conv_out.bias"];
    var.set(&(var.as_tensor() + 1.0).unwrap()).unwrap();
    assert!(relative_error(&of(&policy), &of(&model().folder.unet)) > 0.1);
}
