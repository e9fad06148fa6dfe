//! One update: roll out, score, choose, and take the gradients of the chosen.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::chain::{Chain, Level, Row, pick};
use super::draw::{Start, starts, stride};
use super::select::{Pick, aggregate, select};
use super::tracks::{Track, Tracks};
use crate::diffusion::denoiser::{Conditioning, TextCond};
use crate::diffusion::guidance::Guided;
use crate::diffusion::meter::{Meter, MeteredDecoder, MeteredDenoiser};
use crate::diffusion::noise::Purpose;
use crate::diffusion::schedule::NoiseSchedule;
use crate::diffusion::sdxl_model::SdxlModel;
use crate::train::objective::Objective;
use crate::train::pass::Policy;
use crate::train::score::{Scorer, Scores, finite_mean};
use crate::train::settings::{Method, Renoise, Score, Select, Settings};
use crate::util::CancelToken;
use crate::{Error, Result};

/// What the trajectories of one prompt or image have in common.
#[derive(Clone, Debug)]
pub struct Group {
    /// What images are scored against.
    pub prompt: String,
    pub text: TextCond,
    /// Its trajectories' clean latents [n, C, h, w] (or [1, C, h, w] for all of them).
    pub clean: Tensor,
    /// The noise from which those were generated, of the same shape; none of data.
    pub noise: Option<Tensor>,
    /// Their images' scores, where those count.
    pub scores: Option<Vec<f64>>,
}

/// One update's models.
#[derive(Clone, Copy)]
pub struct Models<'a> {
    /// The policy without gradients.
    pub actor: &'a Guided<SdxlModel>,
    pub reference: &'a Guided<SdxlModel>,
    pub meter: &'a Meter,
    pub cancel: &'a CancelToken,
}

/// What an update saw.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Groups that were learnt from.
    pub used: usize,
    pub skipped: BTreeMap<&'static str, u64>,
    /// Means over the groups that were learnt from, by name.
    pub means: BTreeMap<String, f64>,
    /// Forward and backward passes of a sample each.
    pub policy_passes: u64,
    /// Each trajectory's score, by group; none where there is nothing to choose from.
    pub scores: Vec<Vec<f64>>,
    /// What was chosen in each group.
    pub picks: Vec<Option<Pick>>,
}

/// The method with its settings.
pub struct Sharpening<'a> {
    pub method: Method,
    pub settings: &'a Settings,
    pub schedule: &'a NoiseSchedule,
    /// The null conditioning of sampling.
    pub null: TextCond,
}

impl Sharpening<'_> {
    /// Adds the gradients of `update` on these groups to the policy's. All randomness is of the
    /// run's seed and the update.
    ///
    /// # Errors
    /// The models', `Error::Cancelled`.
    pub fn update(
        &self,
        update: u64,
        groups: &[Group],
        models: Models,
        scorer: &mut Scorer,
        policy: &mut Policy,
    ) -> Result<Report> {
        let n = self.settings.n;
        let starts = starts(self.schedule, self.settings, update, groups.len())?;
        let conds: Vec<Conditioning> = groups
            .iter()
            .map(|group| self.conditioning(&group.text, self.settings.chain_guidance))
            .collect();
        let rows: Vec<Row> = (0..groups.len() * n)
            .map(|row| Row {
                start: starts[row / n],
                candidate: (row % n) as u64,
                cond: &conds[row / n],
            })
            .collect();
        let (clean, noise) = self.latents(groups, &starts)?;
        let t: Vec<f64> = rows.iter().map(|row| row.start.t).collect();
        let x = self.schedule.add_noise(&clean, &noise, &t)?;
        let chain = self.chain(models);
        let mut report = Report::default();

        let (scores, levels) = if n == 1 {
            (vec![Vec::new(); groups.len()], None)
        } else if self.settings.score == Score::Sample {
            (groups.iter().map(|g| g.scores.clone().unwrap_or_default()).collect(), None)
        } else {
            let levels = chain.roll(&x, &rows, true)?;
            let scores = self.score(groups, &rows, &levels, models, scorer, &mut report)?;
            (scores, Some(levels))
        };
        report.scores.clone_from(&scores);
        let picks = self.picks(&starts, scores, &mut report);
        report.picks.clone_from(&picks);
        let chosen = self.chosen(&picks);
        if chosen.is_empty() {
            return Ok(report);
        }
        // Row numbers from here on are those of the chosen, or of all that were rolled out.
        let levels = match levels {
            Some(levels) => levels,
            None => {
                let rows: Vec<Row> = chosen.iter().map(|(row, _)| rows[*row]).collect();
                let start: Vec<usize> = chosen.iter().map(|(row, _)| *row).collect();
                let mut levels = chain.roll(&pick(&x, &start)?, &rows, false)?;
                for level in &mut levels {
                    level.rows.iter_mut().for_each(|row| *row = start[*row]);
                }
                levels
            }
        };
        let mut tracks = Vec::with_capacity(chosen.len());
        for (row, sign) in &chosen {
            tracks.push(Track {
                group: row / n,
                row: *row,
                sign: *sign,
                start: rows[*row].start,
                cond: conds[row / n].clone(),
                loss_cond: self.conditioning(&groups[row / n].text, self.settings.loss_guidance),
                clean: clean.get(*row)?,
                noise: noise.get(*row)?,
            });
        }
        let tracks = Tracks {
            settings: self.settings,
            schedule: self.schedule,
            stride: stride(self.schedule, self.settings),
            tracks,
            levels: &levels,
            gaps: picks.iter().map(|pick| pick.map_or(0.0, |pick| pick.gap)).collect(),
            objective: (self.method == Method::Rlhf).then(|| Objective::from(self.settings)),
        };
        let reference = MeteredDenoiser::new(models.reference, models.meter);
        tracks.learn(&reference, policy, &mut report)?;
        Ok(report)
    }

    fn conditioning(&self, text: &TextCond, guidance_scale: f64) -> Conditioning {
        let negative = (guidance_scale != 1.0)
            .then(|| TextCond { time_ids: text.time_ids, ..self.null.clone() });
        Conditioning { positive: text.clone(), negative, guidance_scale, guidance_rescale: 0.0 }
    }

    fn chain<'b>(&'b self, models: Models<'b>) -> Chain<'b> {
        Chain {
            denoiser: MeteredDenoiser::new(models.actor, models.meter),
            schedule: self.schedule,
            stride: stride(self.schedule, self.settings),
            eta: self.settings.eta,
            estimate_steps: self.settings.estimate_steps,
            micro_batch: self.settings.rollout_batch,
            cancel: models.cancel,
        }
    }

    /// Clean latents and the noise that is added to them, a row for each trajectory:
    /// [groups · n, C, h, w] each.
    ///
    /// # Errors
    /// When there is no noise to reuse.
    pub fn latents(&self, groups: &[Group], starts: &[Start]) -> Result<(Tensor, Tensor)> {
        let n = self.settings.n;
        let (mut clean, mut noise) = (Vec::new(), Vec::new());
        for (group, start) in groups.iter().zip(starts) {
            let (given, channels, height, width) = group.clean.dims4()?;
            let shape = (channels, height, width);
            for i in 0..n {
                let own = if given == 1 { 0 } else { i };
                clean.push(group.clean.get(own)?);
                let fresh = |candidate: usize| {
                    let device = group.clean.device();
                    start.key.normal(Purpose::Renoise, 0, candidate as u64, shape, device)
                };
                noise.push(match self.settings.renoise {
                    Renoise::FreshShared => fresh(0)?,
                    Renoise::FreshIndep => fresh(i)?,
                    Renoise::Reuse => match &group.noise {
                        Some(noise) => noise.get(own)?,
                        None => {
                            let message = "images from data have no noise to reuse";
                            return Err(Error::invalid("renoise", message));
                        }
                    },
                });
            }
        }
        Ok((Tensor::stack(&clean, 0)?, Tensor::stack(&noise, 0)?))
    }

    /// Each trajectory's score, group by group.
    fn score(
        &self,
        groups: &[Group],
        rows: &[Row],
        levels: &[Level],
        models: Models,
        scorer: &mut Scorer,
        report: &mut Report,
    ) -> Result<Vec<Vec<f64>>> {
        let n = self.settings.n;
        let (mut latents, mut prompts, mut sets, mut places) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (k, level) in levels.iter().enumerate() {
            latents.extend(level.x0.clone());
            for row in &level.rows {
                prompts.push(groups[row / n].prompt.as_str());
                sets.push((row / n) * levels.len() + k);
                places.push(*row);
            }
        }
        let decoder = MeteredDecoder::new(&models.actor.0, models.meter);
        let scores = scorer.score(&decoder, &Tensor::cat(&latents, 0)?, &prompts, &sets)?;
        self.describe(&scores, &places, rows, report);
        let mut of_row = vec![Vec::new(); rows.len()];
        scores.total.iter().zip(&places).for_each(|(score, row)| of_row[*row].push(*score));
        let totals: Vec<f64> =
            of_row.iter().map(|scores| aggregate(scores, self.settings.aggregate)).collect();
        Ok(totals.chunks(n).map(<[f64]>::to_vec).collect())
    }

    /// Notes the scores' means, in all and by quarters of the schedule.
    fn describe(&self, scores: &Scores, places: &[usize], rows: &[Row], report: &mut Report) {
        let quarter = self.schedule.num_train_timesteps() as f64 / 4.0;
        let mut bands: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for (score, row) in scores.total.iter().zip(places) {
            let band = ((rows[*row].start.t / quarter) as usize).min(3);
            bands.entry(band).or_default().push(*score);
        }
        for (band, scores) in bands {
            let mean = finite_mean(&scores);
            report.means.extend(mean.map(|mean| (format!("reward_t{}", band + 1), mean)));
        }
        report.means.extend(scores.means());
    }

    /// What is learnt from in each group.
    fn picks(
        &self,
        starts: &[Start],
        scores: Vec<Vec<f64>>,
        report: &mut Report,
    ) -> Vec<Option<Pick>> {
        if self.settings.n == 1 {
            return starts.iter().map(|_| Some(Pick { best: 0, worst: 0, gap: 0.0 })).collect();
        }
        let pick = |(start, mut scores): (&Start, Vec<f64>)| {
            if self.settings.select == Select::Random {
                let mut rng = start.key.rng(Purpose::Resample, 0, 0);
                rand::seq::SliceRandom::shuffle(scores.as_mut_slice(), &mut rng);
            }
            match select(&scores, self.settings.min_gap) {
                Ok(pick) => Some(pick),
                Err(why) => {
                    *report.skipped.entry(why.name()).or_default() += 1;
                    None
                }
            }
        };
        starts.iter().zip(scores).map(pick).collect()
    }

    /// Rows to learn from, and towards (1) or away (−1).
    fn chosen(&self, picks: &[Option<Pick>]) -> Vec<(usize, f64)> {
        let n = self.settings.n;
        let mut chosen = Vec::new();
        for (group, pick) in picks.iter().enumerate() {
            if let Some(pick) = pick {
                chosen.push((group * n + pick.best, 1.0));
                if self.method == Method::Rlhf {
                    chosen.push((group * n + pick.worst, -1.0));
                }
            }
        }
        chosen
    }
}

pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}
