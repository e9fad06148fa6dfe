//! The chosen trajectories: their states, what predictions there are compared with, and the loss.

use candle_core::Tensor;

use super::chain::{Level, Row, chain_noise, pick};
use super::draw::Start;
use super::step::{Report, mean};
use crate::Result;
use crate::diffusion::ddim::Transition;
use crate::diffusion::denoiser::{Conditioning, TextCond};
use crate::diffusion::guidance::combine;
use crate::diffusion::meter::MeteredDenoiser;
use crate::diffusion::schedule::NoiseSchedule;
use crate::train::objective::Objective;
use crate::train::pass::{Anchor, Policy, Predicted, Sample, evaluate, squared_errors};
use crate::train::settings::{ChainGrad, ReferenceStates, Settings, Target};

/// A chosen trajectory.
#[derive(Clone, Debug)]
pub struct Track {
    pub group: usize,
    /// Of all rows that were rolled out.
    pub row: usize,
    /// 1: towards it; −1: away from it.
    pub sign: f64,
    pub start: Start,
    /// Of the chain.
    pub cond: Conditioning,
    /// Of the loss.
    pub loss_cond: Conditioning,
    /// The clean latent and the noise that took it to the start, [C, h, w].
    pub clean: Tensor,
    pub noise: Tensor,
}

/// All chosen trajectories of an update, those of a group next to each other.
pub struct Tracks<'a> {
    pub settings: &'a Settings,
    pub schedule: &'a NoiseSchedule,
    pub stride: f64,
    pub tracks: Vec<Track>,
    /// Whose rows include the tracks'.
    pub levels: &'a [Level],
    /// Score of the best less that of the worst, by group.
    pub gaps: Vec<f64>,
    /// Of pairs; without it trajectories are imitated.
    pub objective: Option<Objective>,
}

/// What the reference makes of the states: one for each state of each track.
#[derive(Default)]
struct Reference {
    losses: Vec<f64>,
    /// Where all states were asked for.
    outputs: Option<Tensor>,
}

impl Tracks<'_> {
    /// Adds the gradients of the mean loss over groups.
    ///
    /// # Errors
    /// The models'.
    pub fn learn(
        &self,
        reference: &MeteredDenoiser,
        policy: &mut Policy,
        report: &mut Report,
    ) -> Result<()> {
        let samples: Vec<Vec<Sample>> =
            self.tracks.iter().map(|track| self.samples(track)).collect::<Result<_>>()?;
        let of_reference = match self.objective {
            Some(_) => self.reference(&samples, reference)?,
            None => Reference::default(),
        };
        let per_group = if self.objective.is_some() { 2 } else { 1 };
        report.used = self.tracks.len() / per_group;
        let scale = 1.0 / report.used as f64;
        let (mut seen, mut notes) = (0, Notes::default());
        for part in
            (0..self.tracks.len()).collect::<Vec<_>>().chunks(self.settings.micro * per_group)
        {
            let range = part[0]..part[0] + part.len();
            let (tracks, samples) = (&self.tracks[range.clone()], &samples[range]);
            let count: usize = samples.iter().map(Vec::len).sum();
            let known = of_reference.losses.get(seen..seen + count).unwrap_or_default();
            let outputs = of_reference.outputs.as_ref();
            let outputs = outputs.map(|all| all.narrow(0, seen, count)).transpose()?;
            let anchor = outputs.as_ref().and_then(|outputs| self.anchor(samples, outputs));
            let predicted = policy.learn(
                |policy| match self.settings.chain_grad {
                    ChainGrad::Detach => policy.errors(&samples.concat()),
                    ChainGrad::Through => self.through(policy, tracks, samples),
                },
                |losses| Ok(self.factors(tracks, samples, losses, known, &mut notes)),
                anchor.as_ref(),
                scale,
            )?;
            if let Some(outputs) = &outputs {
                notes.kl.extend(self.divergence(&samples.concat(), &predicted, outputs)?);
            }
            let passes = samples.iter().flatten().map(|s| s.cond.forwards_per_eval());
            report.policy_passes += passes.sum::<u64>();
            seen += count;
        }
        notes.into(report, self.objective.is_some());
        Ok(())
    }

    /// A track's states with their targets.
    fn samples(&self, track: &Track) -> Result<Vec<Sample>> {
        let mut samples = Vec::with_capacity(track.start.states);
        for level in self.levels {
            let Some(at) = level.rows.iter().position(|row| *row == track.row) else { continue };
            let (x, t) = (level.x.get(at)?, level.t[at]);
            let one = |x: &Tensor| x.unsqueeze(0);
            let noise = match self.settings.target {
                Target::EpsInit => track.noise.clone(),
                Target::EpsExact => {
                    let abar = self.schedule.abar(t);
                    ((&x - (&track.clean * abar.sqrt())?)? / (1.0 - abar).sqrt())?
                }
            };
            let target = self.schedule.target(&one(&track.clean)?, &one(&noise)?, &[t])?.get(0)?;
            samples.push(Sample { x, t, target, cond: track.loss_cond.clone() });
        }
        Ok(samples)
    }

    fn reference(&self, samples: &[Vec<Sample>], denoiser: &MeteredDenoiser) -> Result<Reference> {
        let rows = self.settings.rollout_batch;
        if self.settings.reference_states == ReferenceStates::All {
            let Predicted { outputs, losses } = evaluate(denoiser, &samples.concat(), rows)?;
            return Ok(Reference { losses, outputs: Some(outputs) });
        }
        let first: Vec<Sample> = samples.iter().map(|track| track[0].clone()).collect();
        let found = evaluate(denoiser, &first, rows)?.losses;
        // The same for every state, so that the mean over states is the first's.
        let repeated = found.iter().zip(samples).flat_map(|(l, track)| vec![*l; track.len()]);
        Ok(Reference { losses: repeated.collect(), outputs: None })
    }

    /// What holds the predictions to the reference's: `anchor` times their mean squared distance,
    /// a mean over a trajectory's states and a sum over the pair.
    fn anchor(&self, samples: &[Vec<Sample>], reference: &Tensor) -> Option<Anchor> {
        let weight = self.settings.anchor;
        let even = |states: &Vec<Sample>| vec![weight / states.len() as f64; states.len()];
        let weights = samples.iter().flat_map(even).collect();
        (weight > 0.0).then(|| Anchor { outputs: reference.clone(), weights })
    }

    /// ∂loss/∂error of each state of these tracks, which are of whole groups.
    fn factors(
        &self,
        tracks: &[Track],
        samples: &[Vec<Sample>],
        losses: &[f64],
        reference: &[f64],
        notes: &mut Notes,
    ) -> Vec<f64> {
        let mut from = 0;
        // Of each track: its mean loss, and the reference's.
        let means: Vec<(f64, f64)> = samples
            .iter()
            .map(|states| {
                let range = from..from + states.len();
                from = range.end;
                (mean(&losses[range.clone()]), reference.get(range).map_or(0.0, mean))
            })
            .collect();
        let Some(objective) = &self.objective else {
            notes.losses.extend(means.iter().map(|(loss, _)| *loss));
            notes.gaps.extend(tracks.iter().map(|track| self.gaps[track.group]));
            let even = |states: &Vec<Sample>| vec![1.0 / states.len() as f64; states.len()];
            return samples.iter().flat_map(even).collect();
        };
        let mut factors = Vec::with_capacity(losses.len());
        for (pair, ((tracks, means), states)) in
            tracks.chunks(2).zip(means.chunks(2)).zip(samples.chunks(2)).enumerate()
        {
            debug_assert!(tracks[0].sign > tracks[1].sign, "pair {pair}");
            let gap = self.gaps[tracks[0].group];
            let gain = |i: usize| means[i].1 - means[i].0;
            let delta = gain(0) - gain(1);
            let slope = objective.derivative(delta, gap);
            for (track, states) in tracks.iter().zip(states) {
                let factor = -track.sign * slope / states.len() as f64;
                factors.extend(vec![factor; states.len()]);
            }
            notes.losses.push(objective.value(delta, gap));
            notes.gaps.push(gap);
            notes.deltas.push(delta);
            notes.gains[0].push(gain(0));
            notes.gains[1].push(gain(1));
        }
        factors
    }

    /// Errors [R] with gradients through the sampler's steps, in the order of the samples.
    fn through(
        &self,
        policy: &Policy,
        tracks: &[Track],
        samples: &[Vec<Sample>],
    ) -> Result<(Tensor, Tensor)> {
        let longest = samples.iter().map(Vec::len).max().unwrap_or(0);
        let mut active: Vec<usize> = (0..tracks.len()).collect();
        let firsts: Vec<&Tensor> = samples.iter().map(|states| &states[0].x).collect();
        let mut x = Tensor::stack(&firsts, 0)?;
        let (mut errors, mut outputs, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for k in 0..longest {
            let stays: Vec<usize> =
                (0..active.len()).filter(|i| samples[active[*i]].len() > k).collect();
            x = pick(&x, &stays)?;
            active = stays.into_iter().map(|i| active[i]).collect();
            let here: Vec<&Sample> = active.iter().map(|i| &samples[*i][k]).collect();
            let t: Vec<f64> = here.iter().map(|s| s.t).collect();
            let text: Vec<&TextCond> = here.iter().map(|s| &s.cond.positive).collect();
            let output = policy.predict(&x, &t, &text)?;
            let targets: Vec<&Tensor> = here.iter().map(|s| &s.target).collect();
            errors.push(squared_errors(&output, &Tensor::stack(&targets, 0)?)?);
            outputs.push(output.clone());
            places.extend(active.iter().map(|track| (*track, k)));
            if k + 1 < longest {
                x = self.next(policy, &x, output, &t, k, active.iter().map(|i| &tracks[*i]))?;
            }
        }
        let mut order: Vec<u32> = (0..places.len() as u32).collect();
        order.sort_by_key(|i| places[*i as usize]);
        let order = Tensor::new(order, x.device())?;
        let sorted = |parts: Vec<Tensor>| Tensor::cat(&parts, 0)?.index_select(&order, 0);
        Ok((sorted(errors)?, sorted(outputs)?))
    }

    /// The states a stride further down, with their graph.
    fn next<'b>(
        &self,
        policy: &Policy,
        x: &Tensor,
        output: Tensor,
        t: &[f64],
        k: usize,
        tracks: impl Iterator<Item = &'b Track>,
    ) -> Result<Tensor> {
        let tracks: Vec<&Track> = tracks.collect();
        let conds: Vec<&Conditioning> = tracks.iter().map(|track| &track.cond).collect();
        // Every chain has the same guidance.
        let nulls: Vec<&TextCond> = conds.iter().filter_map(|c| c.unconditional()).collect();
        let output = match nulls.is_empty() {
            true => output,
            false => combine(&policy.predict(x, t, &nulls)?, &output, &conds)?,
        };
        let prev: Vec<f64> = t.iter().map(|t| t - self.stride).collect();
        let transition = Transition::new(self.schedule, t, &prev, self.settings.eta)?;
        let (x0, eps) = transition.x0_eps(x, &output)?;
        let mean = transition.mean(&x0, &eps)?;
        if self.settings.eta == 0.0 {
            return Ok(mean);
        }
        let row = |track: &&'b Track| Row {
            start: track.start,
            candidate: (track.row % self.settings.n) as u64,
            cond: &track.cond,
        };
        let rows: Vec<Row> = tracks.iter().map(row).collect();
        transition.add_noise(&mean, &chain_noise(&rows, k, x)?)
    }

    /// KL divergence from the reference of one step of the stochastic sampler (DDIM, eta 1) from
    /// each state, in nats: ‖μ − μ_ref‖² / 2σ².
    fn divergence(
        &self,
        samples: &[Sample],
        predicted: &Predicted,
        reference: &Tensor,
    ) -> Result<Vec<f64>> {
        let t: Vec<f64> = samples.iter().map(|s| s.t).collect();
        let prev: Vec<f64> = t.iter().map(|t| t - self.stride).collect();
        let transition = Transition::new(self.schedule, &t, &prev, 1.0)?;
        let x = Tensor::stack(&samples.iter().map(|s| &s.x).collect::<Vec<_>>(), 0)?;
        let mean = |output: &Tensor| {
            let (x0, eps) = transition.x0_eps(&x, output)?;
            transition.mean(&x0, &eps)
        };
        let apart =
            (mean(&predicted.outputs)? - mean(reference)?)?.sqr()?.flatten_from(1)?.sum(1)?;
        let apart = apart.to_vec1::<f32>()?;
        let with_noise = apart.iter().zip(transition.std()).filter(|(_, std)| **std > 0.0);
        Ok(with_noise.map(|(apart, std)| f64::from(*apart) / (2.0 * std * std)).collect())
    }
}

/// What is noted of each group.
#[derive(Default)]
struct Notes {
    losses: Vec<f64>,
    gaps: Vec<f64>,
    deltas: Vec<f64>,
    /// Of winners and losers: the reference's loss less the model's.
    gains: [Vec<f64>; 2],
    kl: Vec<f64>,
}

impl Notes {
    fn into(self, report: &mut Report, pairs: bool) {
        let mut note = |name: &str, values: &[f64]| {
            if !values.is_empty() {
                report.means.insert(name.to_owned(), mean(values));
            }
        };
        note("loss", &self.losses);
        note("gap", &self.gaps);
        note("kl", &self.kl);
        if pairs {
            note("delta", &self.deltas);
            note("winner_gain", &self.gains[0]);
            note("loser_gain", &self.gains[1]);
            let right: Vec<f64> = self.deltas.iter().map(|d| f64::from(*d > 0.0)).collect();
            note("accuracy", &right);
        }
    }
}
