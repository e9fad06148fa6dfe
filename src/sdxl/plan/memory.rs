//! Where the memory of a run goes.

use candle_core::DType;
use serde::Serialize;

use super::cost::{Cost, Peak};
use super::network::Networks;
use super::saved::{Rule, Saving, Trained};
use super::trace::Trace;
use super::unet::{Sample, unet};
use super::vae::decode;
use crate::sdxl::vae_tiling::Bounds;
use crate::{Error, Result};

/// What the run does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum Mode {
    /// Guidance runs every sample twice.
    Infer { guided: bool },
    /// Adapters on the modules whose names end in one of `targets`.
    Lora { rank: usize, targets: Vec<String> },
    /// Every parameter of the U-Net; `reference`: beside a copy of the base U-Net.
    Full { reference: bool },
}

impl Mode {
    fn trained(&self) -> Trained<'_> {
        match self {
            Self::Infer { .. } => Trained::Nothing,
            Self::Lora { rank, targets } => Trained::Adapters { rank: *rank as u64, targets },
            Self::Full { .. } => Trained::Everything,
        }
    }

    pub fn trains(&self) -> bool {
        !matches!(self, Self::Infer { .. })
    }
}

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Setting {
    /// Pixels.
    pub width: usize,
    pub height: usize,
    /// Prompts at a time.
    pub batch: usize,
    /// Of the U-Net and the text towers; the VAE is f32.
    #[serde(serialize_with = "name")]
    pub dtype: DType,
    #[serde(flatten)]
    pub mode: Mode,
    /// Trajectories of a prompt.
    pub trajectories: usize,
    /// States of a trajectory that are trained on.
    pub steps: usize,
    /// Images that the VAE decodes at once.
    pub decode_batch: usize,
}

fn name<S: serde::Serializer>(dtype: &DType, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(dtype.as_str())
}

impl Setting {
    /// Making one image.
    pub fn one_image(width: usize, height: usize, dtype: DType, guided: bool) -> Self {
        Self {
            width,
            height,
            batch: 1,
            dtype,
            mode: Mode::Infer { guided },
            trajectories: 1,
            steps: 1,
            decode_batch: 1,
        }
    }

    /// Samples that a pass of the U-Net can take: all states whose graphs can be alive at
    /// once, or without training all trajectories.
    pub fn samples(&self) -> usize {
        let trajectories = self.batch * self.trajectories;
        if self.mode.trains() { trajectories * self.steps } else { trajectories }
    }

    /// # Errors
    /// Names the first number that is 0, or the type that is none of f32, bf16 and f16.
    fn check(&self) -> Result<()> {
        let counts = [
            ("batch", self.batch),
            ("n", self.trajectories),
            ("m", self.steps),
            ("decode-batch", self.decode_batch),
        ];
        if let Some((field, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(Error::invalid(*field, "expected at least 1"));
        }
        if let Mode::Lora { rank, targets } = &self.mode {
            if *rank == 0 {
                return Err(Error::invalid("rank", "expected at least 1"));
            }
            if targets.is_empty() {
                return Err(Error::invalid("targets", "expected at least one module name"));
            }
        }
        if !matches!(self.dtype, DType::F32 | DType::BF16 | DType::F16) {
            return Err(Error::unknown(
                "dtype",
                "type",
                self.dtype.as_str(),
                ["f32", "bf16", "f16"],
            ));
        }
        Ok(())
    }
}

/// How the work is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Schedule {
    /// Samples in a U-Net pass, and in training samples whose graphs are alive at once. With
    /// all of [`Setting::samples`], graphs stay while the trajectories are scored; with fewer,
    /// trajectories are first made without gradients.
    pub micro_batch: usize,
    /// Whether every block is computed anew in the backward pass.
    pub recompute: bool,
}

/// When a piece of memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Always,
    /// While trajectories are made, without gradients.
    Rollout,
    /// While latents are decoded.
    Decode,
    /// While graphs are alive.
    Backward,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Rollout => "rolling out",
            Self::Decode => "decoding",
            Self::Backward => "training",
        }
    }
}

/// A piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    UnetWeights,
    ReferenceWeights,
    Text1Weights,
    Text2Weights,
    VaeWeights,
    AdapterWeights,
    Masters,
    Gradients,
    Moments,
    RolloutStates,
    UnetForward,
    AttentionWorkspace,
    VaeDecode,
    Activations,
    GradientsInFlight,
}

impl Item {
    pub fn name(self) -> &'static str {
        match self {
            Self::UnetWeights => "U-Net weights",
            Self::ReferenceWeights => "reference U-Net weights",
            Self::Text1Weights => "text tower 1 weights",
            Self::Text2Weights => "text tower 2 weights",
            Self::VaeWeights => "VAE weights, f32",
            Self::AdapterWeights => "adapter weights",
            Self::Masters => "f32 masters",
            Self::Gradients => "gradients, f32",
            Self::Moments => "moments, f32",
            Self::RolloutStates => "rollout states, f32",
            Self::UnetForward => "U-Net forward",
            Self::AttentionWorkspace => "attention workspace",
            Self::VaeDecode => "VAE decode, f32",
            Self::Activations => "saved activations",
            Self::GradientsInFlight => "gradients in flight",
        }
    }
}

/// One line of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    pub item: Item,
    pub phase: Phase,
    pub bytes: u64,
}

/// One kind of pass and what it costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pass {
    pub name: &'static str,
    #[serde(flatten)]
    pub cost: Cost,
    /// Seconds below which it cannot be at the plan's [`Peak`].
    pub least_seconds: f64,
}

/// What a run takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MemoryPlan {
    #[serde(flatten)]
    pub setting: Setting,
    #[serde(flatten)]
    pub schedule: Schedule,
    pub trained_parameters: u64,
    pub lines: Vec<Line>,
    /// The phase in which most is taken, and how much then.
    pub peak_phase: Phase,
    pub peak_bytes: u64,
    /// Of one sample.
    pub passes: Vec<Pass>,
    /// Arithmetic of one sample's backward pass.
    pub backward_flops: u64,
}

/// f32.
const WIDE: u64 = 4;
/// f32 latents of a state that a rollout keeps: x_t, the prediction and the estimate of x_0.
const LATENTS_PER_STATE: u64 = 3;

impl MemoryPlan {
    /// # Errors
    /// Names what is unusable in the setting, the schedule or a configuration.
    pub fn new(
        networks: &Networks,
        setting: &Setting,
        schedule: Schedule,
        peak: Peak,
    ) -> Result<Self> {
        setting.check()?;
        let limit = setting.samples();
        if schedule.micro_batch == 0 || schedule.micro_batch > limit {
            let message = format!("expected 1 to {limit}, got {}", schedule.micro_batch);
            return Err(Error::invalid("micro-batch", message));
        }
        if schedule.recompute && !setting.mode.trains() {
            return Err(Error::invalid("recompute", "there is no backward pass"));
        }
        let sizes = Sizes::of(networks, setting)?;
        let lines = sizes.lines(schedule)?;
        let phases = [Phase::Rollout, Phase::Decode, Phase::Backward];
        let taken = |phase: Phase| -> u64 {
            let then = lines.iter().filter(|line| [Phase::Always, phase].contains(&line.phase));
            then.map(|line| line.bytes).sum()
        };
        // The first of equal ones.
        let peak_phase = phases.into_iter().rev().max_by_key(|phase| taken(*phase));
        let peak_phase = peak_phase.unwrap_or(Phase::Always);
        Ok(Self {
            setting: setting.clone(),
            schedule,
            trained_parameters: sizes.trained,
            peak_phase,
            peak_bytes: taken(peak_phase),
            lines,
            passes: sizes.passes(peak)?,
            backward_flops: sizes.sample(1)?.backward_flops(setting.mode.trained()),
        })
    }

    /// Bytes of an item, over all phases in which it is listed: the most.
    pub fn bytes(&self, item: Item) -> u64 {
        let lines = self.lines.iter().filter(|line| line.item == item);
        lines.map(|line| line.bytes).max().unwrap_or(0)
    }
}

/// What the lines are computed from.
struct Sizes<'a> {
    networks: &'a Networks,
    setting: &'a Setting,
    latent: (usize, usize),
    unet_parameters: u64,
    trained: u64,
    /// Bytes of a value of the U-Net.
    element: u64,
}

impl<'a> Sizes<'a> {
    fn of(networks: &'a Networks, setting: &'a Setting) -> Result<Self> {
        let mut sizes = Self {
            networks,
            setting,
            latent: networks.latent(setting.height, setting.width)?,
            unet_parameters: 0,
            trained: 0,
            element: setting.dtype.size_in_bytes() as u64,
        };
        let trace = sizes.sample(1)?;
        sizes.unet_parameters = trace.parameters();
        sizes.trained = match setting.mode {
            Mode::Infer { .. } => 0,
            Mode::Lora { .. } => setting.mode.trained().adapters(&trace),
            Mode::Full { .. } => sizes.unet_parameters,
        };
        if let (Mode::Lora { targets, .. }, 0) = (&setting.mode, sizes.trained) {
            let message = format!("no module of the U-Net ends in any of {}", targets.join(", "));
            return Err(Error::invalid("targets", message));
        }
        Ok(sizes)
    }

    fn sample(&self, batch: usize) -> Result<Trace> {
        let ((height, width), tokens) = (self.latent, self.networks.tokens());
        unet(&self.networks.unet, Sample { batch, height, width, tokens })
    }

    fn decode(&self, batch: usize) -> Result<Trace> {
        decode(&self.networks.vae, batch, (self.setting.height, self.setting.width))
    }

    fn lines(&self, schedule: Schedule) -> Result<Vec<Line>> {
        let Setting { mode, .. } = self.setting;
        let mut lines = self.weights()?;
        let mut add = |item, phase, bytes| {
            if bytes > 0 {
                lines.push(Line { item, phase, bytes });
            }
        };
        let half = self.element < WIDE;
        match mode {
            Mode::Lora { .. } => {
                // In the model's type too, which the products take.
                let each = WIDE + if half { self.element } else { 0 };
                add(Item::AdapterWeights, Phase::Always, each * self.trained);
            }
            Mode::Full { .. } if half => {
                add(Item::Masters, Phase::Always, WIDE * self.trained);
            }
            _ => {}
        }
        add(Item::Gradients, Phase::Always, WIDE * self.trained);
        add(Item::Moments, Phase::Always, 2 * WIDE * self.trained);
        let values = self.networks.unet.in_channels * self.latent.0 * self.latent.1;
        let states = (values * self.setting.samples()) as u64;
        add(Item::RolloutStates, Phase::Always, LATENTS_PER_STATE * WIDE * states);

        // Trajectories are made without gradients, several at a time.
        let together = schedule.micro_batch.min(self.setting.batch * self.setting.trajectories);
        let guided = matches!(mode, Mode::Infer { guided: true });
        let forward = self.sample(together * (1 + usize::from(guided)))?;
        add(Item::UnetForward, Phase::Rollout, forward.live(self.element));
        add(Item::AttentionWorkspace, Phase::Rollout, forward.attention_workspace(false));
        let images = self.setting.batch * self.setting.trajectories;
        let together = self.setting.decode_batch.min(images);
        let size = (self.setting.height, self.setting.width);
        let vae = &self.networks.vae;
        let (decoded, finished) = match Bounds::default().tile(vae, size) {
            // Tiles, and the images that they become, once more while they are joined.
            Some(tile) => (
                decode(vae, together, tile)?,
                2 * (together * vae.out_channels * size.0 * size.1) as u64,
            ),
            None => (self.decode(together)?, 0),
        };
        add(Item::VaeDecode, Phase::Decode, decoded.live(WIDE) + finished * WIDE);
        add(Item::AttentionWorkspace, Phase::Decode, decoded.attention_workspace(false));
        if !mode.trains() {
            return Ok(lines);
        }

        let trained = mode.trained();
        let saving = Saving { trained, rule: Rule::Held, element: self.element };
        let graphs = self.sample(schedule.micro_batch)?;
        let saved = match schedule.recompute {
            true => graphs.saved_recomputing(&saving),
            false => graphs.saved(&saving),
        };
        add(Item::Activations, Phase::Backward, saved);
        if schedule.micro_batch == self.setting.samples() {
            add(Item::Activations, Phase::Decode, saved);
        }
        add(Item::GradientsInFlight, Phase::Backward, graphs.gradients_in_flight(&saving));
        add(Item::AttentionWorkspace, Phase::Backward, graphs.attention_workspace(true));
        Ok(lines)
    }

    fn weights(&self) -> Result<Vec<Line>> {
        let [first, second] = self.networks.text_parameters().map(|n| n * self.element);
        let own = self.unet_parameters * self.element;
        let reference = matches!(self.setting.mode, Mode::Full { reference: true });
        let all = [
            (Item::UnetWeights, own),
            (Item::ReferenceWeights, if reference { own } else { 0 }),
            (Item::Text1Weights, first),
            (Item::Text2Weights, second),
            (Item::VaeWeights, WIDE * self.networks.vae_parameters()?),
        ];
        let line = |(item, bytes)| Line { item, phase: Phase::Always, bytes };
        Ok(all.into_iter().filter(|(_, bytes)| *bytes > 0).map(line).collect())
    }

    fn passes(&self, peak: Peak) -> Result<Vec<Pass>> {
        let pass = |name, trace: &Trace, element| Pass {
            name,
            cost: trace.cost(element),
            least_seconds: trace.least_seconds(element, peak),
        };
        let [first, second] = self.networks.text.each_ref().map(|c| super::clip_text(c, 1));
        Ok(vec![
            pass("U-Net forward", &self.sample(1)?, self.element),
            pass("VAE decode", &self.decode(1)?, WIDE),
            pass("text tower 1", &first, self.element),
            pass("text tower 2", &second, self.element),
        ])
    }
}
