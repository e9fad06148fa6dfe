//! Plots: panels of curves, means with their intervals as a band and bars. A sweep has a panel
//! for each reward on a logarithmic NFE axis and a line for each method.

use std::path::Path;
use std::sync::OnceLock;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::util::write_atomic;
use crate::{Error, Result};

/// One mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// What it cost; above 0 on a logarithmic axis.
    pub x: f64,
    pub mean: f64,
    pub interval: Option<(f64, f64)>,
}

/// One line; an empty curve keeps its place in the legend and its colour.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    pub label: String,
    /// By rising cost.
    pub points: Vec<Point>,
}

impl Curve {
    /// The points that have an interval.
    fn intervals(&self) -> Vec<(&Point, (f64, f64))> {
        self.points.iter().filter_map(|p| Some((p, p.interval?))).collect()
    }
}

/// What lies along the bottom of a panel.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    pub label: String,
    pub logarithmic: bool,
}

/// Curves on the same axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    pub title: String,
    pub x: Axis,
    pub curves: Vec<Curve>,
}

/// Size at scale one.
const PANEL: (u32, u32) = (620, 440);
const TITLE: u32 = 44;
const LEGEND_LINE: u32 = 26;
const FONT: &str = "sans-serif";

/// Okabe and Ito's palette, which colour-blind readers can tell apart.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(60, 60, 60),
];

/// Writes the plot as SVG.
///
/// # Errors
/// When it cannot be drawn or written.
pub fn svg(path: &Path, title: &str, panels: &[Panel]) -> Result<()> {
    fonts()?;
    let layout = Layout::new(panels, 1);
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, layout.size).into_drawing_area();
        layout.draw(&root, title, panels).map_err(|e| Error::file(path, e))?;
        root.present().map_err(|e| Error::file(path, e))?;
    }
    write_atomic(path, text.as_bytes())
}

/// Writes the plot as PNG, at twice the SVG's size.
///
/// # Errors
/// When it cannot be drawn or written.
pub fn png(path: &Path, title: &str, panels: &[Panel]) -> Result<()> {
    fonts()?;
    let layout = Layout::new(panels, 2);
    let (width, height) = layout.size;
    let mut pixels = vec![255u8; width as usize * height as usize * 3];
    {
        let root = BitMapBackend::with_buffer(&mut pixels, layout.size).into_drawing_area();
        layout.draw(&root, title, panels).map_err(|e| Error::file(path, e))?;
        root.present().map_err(|e| Error::file(path, e))?;
    }
    let image = image::RgbImage::from_raw(width, height, pixels)
        .ok_or_else(|| Error::file(path, "the drawing has another size than its image"))?;
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).map_err(|e| Error::file(path, e))?;
    write_atomic(path, bytes.get_ref())
}

/// Registers the embedded font, so that no system font is needed.
fn fonts() -> Result<()> {
    static DONE: OnceLock<bool> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT).is_ok()
    });
    if *done { Ok(()) } else { Err(Error::invalid("plot", "the embedded font is unusable")) }
}

type Drawn<DB> = std::result::Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

struct Layout {
    size: (u32, u32),
    scale: u32,
    /// Legend lines, as indices of curves with their offset in pixels.
    legend: Vec<Vec<(usize, u32)>>,
}

impl Layout {
    fn new(panels: &[Panel], scale: u32) -> Self {
        let width = PANEL.0 * panels.len().max(1) as u32;
        let mut legend: Vec<Vec<(usize, u32)>> = vec![Vec::new()];
        let mut x = 0;
        for (i, curve) in panels.first().into_iter().flat_map(|p| &p.curves).enumerate() {
            // About 8 pixels a letter, and the key in front.
            let wide = 60 + 8 * curve.label.chars().count() as u32;
            if x > 0 && x + wide > width - 80 {
                legend.push(Vec::new());
                x = 0;
            }
            if let Some(line) = legend.last_mut() {
                line.push((i, x));
            }
            x += wide;
        }
        let height = TITLE + PANEL.1 + LEGEND_LINE * legend.len() as u32 + 12;
        Self { size: (width * scale, height * scale), scale, legend }
    }

    fn px(&self, length: u32) -> i32 {
        (length * self.scale) as i32
    }

    fn font(&self, size: u32) -> (&'static str, i32) {
        (FONT, self.px(size))
    }

    fn draw<DB: DrawingBackend>(
        &self,
        root: &DrawingArea<DB, Shift>,
        title: &str,
        panels: &[Panel],
    ) -> Drawn<DB> {
        root.fill(&WHITE)?;
        let centre = self.font(20).into_font().color(&BLACK);
        let centre = centre.pos(Pos::new(HPos::Center, VPos::Center));
        let middle = (self.size.0 as i32 / 2, self.px(TITLE / 2 + 2));
        root.draw(&Text::new(title.to_owned(), middle, centre))?;
        let (_, below) = root.split_vertically(self.px(TITLE));
        let (plots, legend) = below.split_vertically(self.px(PANEL.1));
        let areas = plots.split_evenly((1, panels.len().max(1)));
        for (area, panel) in areas.iter().zip(panels) {
            self.panel(area, panel)?;
        }
        if let Some(panel) = panels.first() {
            self.legend(&legend, panel)?;
        }
        Ok(())
    }

    fn legend<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, Shift>,
        panel: &Panel,
    ) -> Drawn<DB> {
        let left = self.font(16).into_font().color(&BLACK);
        let left = left.pos(Pos::new(HPos::Left, VPos::Center));
        for (line, entries) in self.legend.iter().enumerate() {
            let y = self.px(LEGEND_LINE * line as u32 + LEGEND_LINE / 2);
            for &(i, x) in entries {
                let x = self.px(x + 64);
                let ends = vec![(x, y), (x + self.px(28), y)];
                match self.dash(i) {
                    None => area.draw(&PathElement::new(ends, self.line(i)))?,
                    Some((dash, gap)) => {
                        area.draw(&DashedPathElement::new(ends, dash, gap, self.line(i)))?;
                    }
                }
                self.marker(area, i, (x + self.px(14), y))?;
                let at = (x + self.px(36), y);
                area.draw(&Text::new(panel.curves[i].label.clone(), at, left.clone()))?;
            }
        }
        Ok(())
    }

    fn panel<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, panel: &Panel) -> Drawn<DB> {
        let points: Vec<&Point> = panel.curves.iter().flat_map(|c| &c.points).collect();
        let logarithmic = panel.x.logarithmic;
        let place = |p: &Point| if logarithmic { p.x.log10() } else { p.x };
        let cost = CostAxis::over(points.iter().map(|p| place(p)), logarithmic);
        let y_range = score_axis(points.iter().flat_map(|p| {
            let (low, high) = p.interval.unwrap_or((p.mean, p.mean));
            [p.mean, low, high]
        }));
        let digits = decimals(y_range.end - y_range.start);
        let mut chart = ChartBuilder::on(area)
            .margin(self.px(8))
            .margin_right(self.px(20))
            .caption(&panel.title, self.font(18))
            .x_label_area_size(self.px(46))
            .y_label_area_size(self.px(62))
            .build_cartesian_2d(cost, y_range)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .axis_style(BLACK.mix(0.6).stroke_width(self.scale))
            .x_desc(&panel.x.label)
            .y_labels(8)
            .axis_desc_style(self.font(15))
            .label_style(self.font(14))
            .x_label_formatter(&|x| {
                if logarithmic { format!("{:.0}", 10f64.powf(*x)) } else { format!("{x}") }
            })
            .y_label_formatter(&|y| format!("{y:.digits$}"))
            .set_all_tick_mark_size(self.px(4))
            .draw()?;
        // Bands below bars below lines below markers; many bands would hide each other.
        let at = |p: &Point, y: f64| (place(p), y);
        let crowded = panel.curves.len() > COLOURS.len();
        for (i, curve) in panel.curves.iter().enumerate() {
            let with = curve.intervals();
            if with.len() > 1 && !crowded {
                let lows = with.iter().map(|(p, i)| at(p, i.0));
                let highs = with.iter().rev().map(|(p, i)| at(p, i.1));
                let band: Vec<(f64, f64)> = lows.chain(highs).collect();
                chart.draw_series([Polygon::new(band, colour(i).mix(0.12))])?;
            }
        }
        for (i, curve) in panel.curves.iter().enumerate() {
            let strength = if crowded { 0.3 } else { 0.7 };
            let (bar, wide) = (colour(i).mix(strength).stroke_width(self.scale), self.px(7) as u32);
            chart.draw_series(curve.intervals().iter().map(|(p, (low, high))| {
                ErrorBar::new_vertical(place(p), *low, p.mean, *high, bar, wide)
            }))?;
        }
        let (left, top) = area.get_base_pixel();
        for (i, curve) in panel.curves.iter().enumerate() {
            let line = curve.points.iter().map(|p| at(p, p.mean));
            match self.dash(i) {
                None => chart.draw_series(LineSeries::new(line, self.line(i))).map(|_| ())?,
                Some((dash, gap)) => chart
                    .draw_series(DashedLineSeries::new(line, dash, gap, self.line(i)))
                    .map(|_| ())?,
            }
            for point in &curve.points {
                let (x, y) = chart.backend_coord(&at(point, point.mean));
                self.marker(area, i, (x - left, y - top))?;
            }
        }
        Ok(())
    }

    fn line(&self, i: usize) -> ShapeStyle {
        colour(i).stroke_width(2 * self.scale)
    }

    /// Dash and gap of curve `i`; none where its colour is the first of its kind.
    fn dash(&self, i: usize) -> Option<(i32, i32)> {
        match i / COLOURS.len() {
            0 => None,
            1 => Some((self.px(7), self.px(4))),
            _ => Some((self.px(2), self.px(3))),
        }
    }

    /// The marker of curve `i`, drawn in pixels.
    fn marker<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, Shift>,
        i: usize,
        (x, y): (i32, i32),
    ) -> Drawn<DB> {
        let r = self.px(4);
        let fill = colour(i).filled();
        match i % 4 {
            0 => area.draw(&Circle::new((x, y), r, fill)),
            1 => area.draw(&Rectangle::new([(x - r, y - r), (x + r, y + r)], fill)),
            2 => area.draw(&TriangleMarker::new((x, y), r + self.px(1), fill)),
            _ => {
                let d = r + self.px(1);
                area.draw(&Polygon::new(vec![(x - d, y), (x, y - d), (x + d, y), (x, y + d)], fill))
            }
        }
    }
}

fn colour(i: usize) -> RGBColor {
    COLOURS[i % COLOURS.len()]
}

/// Costs, or their log10 with ticks at 1, 2 and 5 times powers of ten, or at powers
/// of ten alone where those would crowd.
struct CostAxis {
    range: std::ops::Range<f64>,
    ticks: Vec<f64>,
}

impl CostAxis {
    fn over(places: impl Iterator<Item = f64>, logarithmic: bool) -> Self {
        let empty = if logarithmic { (2.0, 3.0) } else { (0.0, 1.0) };
        let (low, high) = bounds(places).unwrap_or(empty);
        let pad = match (logarithmic, high - low) {
            (true, span) if span < 0.2 => 0.25,
            (false, 0.0) => 0.5,
            (true, span) => 0.05 * span,
            (false, span) => 0.03 * span,
        };
        let range = low - pad..high + pad;
        let ticks = if logarithmic { decades(&range) } else { round_numbers(&range) };
        Self { range, ticks }
    }
}

fn decades(range: &std::ops::Range<f64>) -> Vec<f64> {
    let steps: &[f64] = if range.end - range.start <= 2.97 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    (range.start.floor() as i32..=range.end.ceil() as i32)
        .flat_map(|decade| steps.iter().map(move |s| s.log10() + f64::from(decade)))
        .filter(|x| range.contains(x))
        .collect()
}

/// About six multiples of 1, 2 or 5 times a power of ten.
fn round_numbers(range: &std::ops::Range<f64>) -> Vec<f64> {
    let rough = (range.end - range.start) / 6.0;
    let power = rough.log10().floor() as i32;
    let step = [1.0, 2.0, 5.0].into_iter().find(|step| step * 10f64.powi(power) >= rough);
    let (step, power) = step.map_or((1.0, power + 1), |step| (step, power));
    // Divided by a power of ten, so that labels have no digits of rounding.
    let at = |i: i64| match power {
        0.. => i as f64 * step * 10f64.powi(power),
        _ => i as f64 * step / 10f64.powi(-power),
    };
    let (first, last) = (range.start / at(1), range.end / at(1));
    (first.ceil() as i64..=last.floor() as i64).map(at).collect()
}

impl Ranged for CostAxis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<H: KeyPointHint>(&self, hint: H) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.range.clone()
    }
}

/// The least and greatest of the finite values.
fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|v| v.is_finite()).fold(None, |bounds, v| {
        let (low, high) = bounds.unwrap_or((v, v));
        Some((low.min(v), high.max(v)))
    })
}

fn score_axis(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let Some((low, high)) = bounds(values) else { return 0.0..1.0 };
    let pad = if high > low { 0.08 * (high - low) } else { 0.05 * high.abs().max(1e-3) };
    low - pad..high + pad
}

/// Decimals that tell eight labels over `span` apart.
fn decimals(span: f64) -> usize {
    (1.0 - (span / 8.0).log10()).floor().clamp(0.0, 6.0) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_hold_their_values_and_ticks() {
        let axis = CostAxis::over([2.0, 5000f64.log10()].into_iter(), true);
        assert!(axis.range.contains(&2.0) && axis.range.contains(&5000f64.log10()));
        let ticks: Vec<f64> = axis.ticks.iter().map(|t| 10f64.powf(*t).round()).collect();
        assert_eq!(ticks, [100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0]);
        assert!(!CostAxis::over([2.0].into_iter(), true).ticks.is_empty());
        assert_eq!(CostAxis::over(std::iter::empty(), true).ticks.len(), 4);
        let linear = |values: &[f64]| CostAxis::over(values.iter().copied(), false).ticks;
        assert_eq!(linear(&[0.0, 400.0]), [0.0, 100.0, 200.0, 300.0, 400.0]);
        assert_eq!(linear(&[0.0, 1.2]), [0.0, 0.5, 1.0]);
        assert_eq!(linear(&[0.0, 1.0]), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        assert!(linear(&[7.0]).contains(&7.0) && !linear(&[]).is_empty());
        assert_eq!(score_axis(std::iter::empty()), 0.0..1.0);
        let flat = score_axis([0.5].into_iter());
        assert!(flat.start < 0.5 && flat.end > 0.5);
        assert_eq!((decimals(8.0), decimals(0.8), decimals(100.0)), (1, 2, 0));
    }
}
