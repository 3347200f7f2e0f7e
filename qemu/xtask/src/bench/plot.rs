//! Plots of counts as SVG, both axes logarithmic. The same numbers give the same bytes.

use std::ops::Range;

use anyhow::{Result, ensure};
use plotters::coord::Shift;
use plotters::prelude::{
    BLACK, BindKeyPoints, ChartBuilder, Circle, Color, Cross, DashedLineSeries, DrawingArea, IntoDrawingArea, IntoFont,
    IntoLogRange, LineSeries, PathElement, RGBColor, Rectangle, SVGBackend, Text, TextStyle, TriangleMarker, WHITE,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::digits;

/// Width of the plot without its legend, and height.
const SIZE: (u32, u32) = (560, 400);

/// Of Okabe and Ito, told apart by those who see fewer colours, too.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
    RGBColor(127, 127, 127),
];

const GREY: RGBColor = RGBColor(90, 90, 90);

/// One line of a plot.
#[derive(Clone, Debug)]
pub(super) struct Series {
    name: String,
    pub(super) points: Vec<(f64, f64)>,
    dashed: bool,
}

impl Series {
    /// A line through these points. Those that are not above zero have no place on logarithmic axes and are left out.
    pub(super) fn new(name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let mut points: Vec<_> = points.into_iter().filter(|(x, y)| *x > 0.0 && *y > 0.0).collect();
        points.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        Self { name: name.into(), points, dashed: false }
    }

    /// Dashed, as what is compared with.
    pub(super) fn dashed(mut self) -> Self {
        self.dashed = true;
        self
    }

    /// The line's height, which is straight between points in logarithms.
    fn at(&self, x: f64) -> Option<f64> {
        let exact = self.points.iter().find(|(at, _)| *at == x);
        let between = || {
            let pair = self.points.windows(2).find(|pair| pair[0].0 < x && x < pair[1].0)?;
            let [(x0, y0), (x1, y1)] = [pair[0], pair[1]].map(|(x, y)| (x.ln(), y.ln()));
            Some((y0 + (y1 - y0) * (x.ln() - x0) / (x1 - x0)).exp())
        };
        exact.map(|(_, y)| *y).or_else(between)
    }
}

/// Where the lines cross. Lines that only touch do not, and those that run together cross where they meet, if they part on the
/// other side.
pub(super) fn crossovers(one: &Series, other: &Series) -> Vec<(f64, f64)> {
    let mut xs: Vec<f64> = one.points.iter().chain(&other.points).map(|(x, _)| *x).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let mut found = Vec::new();
    // Where they last differed and by how much, and where they have been equal since.
    let (mut last, mut equal) = (None, None);
    for x in xs {
        let (Some(y), Some(other_y)) = (one.at(x), other.at(x)) else { continue };
        let (at, difference) = (x.ln(), y.ln() - other_y.ln());
        if difference == 0.0 {
            equal.get_or_insert(x);
            continue;
        }
        if let Some((before, was)) = last
            && f64::signum(was) != difference.signum()
        {
            let x = equal.unwrap_or_else(|| f64::exp(before + (at - before) * was / (was - difference)));
            found.extend(one.at(x).map(|y| (x, y)));
        }
        (last, equal) = (Some((at, difference)), None);
    }
    found
}

/// What is to be drawn.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    pub(super) title: String,
    pub(super) x_label: String,
    pub(super) y_label: String,
    pub(super) series: Vec<Series>,
    /// Whether to mark where lines cross.
    pub(super) crossovers: bool,
}

impl Plot {
    /// Whether there is anything to draw.
    pub(super) fn has_points(&self) -> bool {
        self.series.iter().any(|series| !series.points.is_empty())
    }

    /// The plot as an SVG file.
    ///
    /// # Errors
    ///
    /// There is nothing to draw.
    pub(super) fn svg(&self) -> Result<String> {
        let points = || self.series.iter().flat_map(|series| &series.points);
        ensure!(self.has_points(), "the plot {:?} has no points", self.title);
        let mut svg = String::new();
        let legend = 60 + 7 * self.series.iter().map(|series| series.name.chars().count()).max().unwrap_or(0) as u32;
        let area = SVGBackend::with_string(&mut svg, (SIZE.0 + legend, SIZE.1)).into_drawing_area();
        area.fill(&WHITE)?;
        let (left, _) = area.split_horizontally(SIZE.0);

        let (x_range, x_ticks) = powers_of_two(extent(points().map(|(x, _)| *x)));
        let (y_range, y_ticks) = powers_of_ten(extent(points().map(|(_, y)| *y)));
        let mut chart = ChartBuilder::on(&left)
            .caption(&self.title, ("sans-serif", 17))
            .margin(10)
            .margin_right(16)
            .x_label_area_size(44)
            .y_label_area_size(62)
            .build_cartesian_2d(
                x_range.log_scale().with_key_points(x_ticks),
                y_range.log_scale().with_key_points(y_ticks),
            )?;
        chart
            .configure_mesh()
            .bold_line_style(RGBColor(220, 220, 220))
            .light_line_style(WHITE)
            .axis_desc_style(("sans-serif", 14))
            .label_style(("sans-serif", 13))
            .x_desc(&self.x_label)
            .y_desc(&self.y_label)
            .x_label_formatter(&|value| unit(*value, 1024.0, ["", "Ki", "Mi", "Gi"]))
            .y_label_formatter(&|value| unit(*value, 1000.0, ["", "k", "M", "G"]))
            .draw()?;

        for (index, series) in self.series.iter().enumerate() {
            let style = colour(index).stroke_width(2);
            let points = series.points.iter().copied();
            if series.dashed {
                chart.draw_series(DashedLineSeries::new(points.clone(), 6, 4, style))?;
            } else {
                chart.draw_series(LineSeries::new(points.clone(), style))?;
            }
            for point in points {
                mark(&area, chart.backend_coord(&point), index)?;
            }

            let (x, y) = (SIZE.0 as i32 + 4, 46 + 22 * index as i32);
            let dashes: &[(i32, i32)] = if series.dashed { &[(0, 6), (10, 16), (20, 26)] } else { &[(0, 26)] };
            for (from, to) in dashes {
                area.draw(&PathElement::new([(x + from, y), (x + to, y)], style))?;
            }
            mark(&area, (x + 13, y), index)?;
            let text = text_style(13, &BLACK).pos(Pos::new(HPos::Left, VPos::Center));
            area.draw(&Text::new(series.name.as_str(), (x + 34, y), text))?;
        }
        for (x, y) in self.crossing_points() {
            let label = if x < 10.0 { format!("{x:.1}") } else { digits(x.round()) };
            let (at, half) = (chart.backend_coord(&(x, y)), 4 * label.len() as i32);
            area.draw(&Circle::new(at, 7, GREY.stroke_width(1)))?;
            area.draw(&Rectangle::new([(at.0 - half, at.1 - 24), (at.0 + half, at.1 - 10)], WHITE.mix(0.8).filled()))?;
            let text = text_style(12, &GREY).pos(Pos::new(HPos::Center, VPos::Center));
            area.draw(&Text::new(label, (at.0, at.1 - 17), text))?;
        }
        area.present()?;
        drop((chart, left, area));
        Ok(svg)
    }

    /// Where lines cross, if that is wanted.
    fn crossing_points(&self) -> Vec<(f64, f64)> {
        let pairs = self
            .series
            .iter()
            .enumerate()
            .flat_map(|(index, one)| self.series[index + 1..].iter().map(move |other| (one, other)));
        if self.crossovers { pairs.flat_map(|(one, other)| crossovers(one, other)).collect() } else { Vec::new() }
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn text_style(size: u32, colour: &'static RGBColor) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size).into_font()).color(colour)
}

fn colour(index: usize) -> RGBColor {
    COLOURS[index % COLOURS.len()]
}

/// Draws the sign of the points of a line; together with the colour no two of forty are the same.
fn mark(area: &Area<'_>, at: (i32, i32), index: usize) -> Result<()> {
    let colour = colour(index);
    let (filled, hollow) = (colour.filled(), colour.stroke_width(2));
    match index % 5 {
        0 => area.draw(&Circle::new(at, 4, filled))?,
        1 => area.draw(&Rectangle::new([(at.0 - 4, at.1 - 4), (at.0 + 4, at.1 + 4)], filled))?,
        2 => area.draw(&TriangleMarker::new(at, 5, filled))?,
        3 => area.draw(&Cross::new(at, 4, hollow))?,
        _ => area.draw(&Circle::new(at, 4, hollow))?,
    }
    Ok(())
}

/// The least and the greatest.
fn extent(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, 0.0), |(least, greatest), value| (value.min(least), value.max(greatest)))
}

/// An axis for sizes: its range, and at most 14 powers of two.
fn powers_of_two((least, greatest): (f64, f64)) -> (Range<f64>, Vec<f64>) {
    let (first, last) = (least.log2().floor() as i32, greatest.log2().ceil() as i32);
    let step = (last - first) as usize / 14 + 1;
    let ticks = (first..=last).step_by(step).map(|exponent| 2f64.powi(exponent));
    (least / 1.15..greatest * 1.15, ticks.filter(|tick| (least..=greatest).contains(tick)).collect())
}

/// An axis for counts: from 1, 2 or 5 times a power of ten to another one, and at most eight of them, else powers of ten.
fn powers_of_ten((least, greatest): (f64, f64)) -> (Range<f64>, Vec<f64>) {
    let decades = least.log10().floor() as i32..=greatest.log10().ceil() as i32 + 1;
    let ticks: Vec<f64> = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(decade))).collect();
    let low = ticks.iter().copied().filter(|tick| *tick <= least).fold(ticks[0], f64::max);
    let end = ticks.iter().position(|tick| *tick >= greatest && *tick > low).unwrap_or(ticks.len() - 1);
    let high = ticks[end];
    let mut ticks: Vec<f64> = ticks.into_iter().filter(|tick| (low..=high).contains(tick)).collect();
    if ticks.len() > 8 {
        ticks.retain(|tick| 10f64.powf(tick.log10().round()) == *tick);
    }
    (low..high, ticks)
}

/// A number in the largest unit that leaves it whole.
fn unit(value: f64, base: f64, names: [&str; 4]) -> String {
    let fits = |power: &usize| value >= base.powi(*power as i32);
    let power = (0..names.len()).rev().find(fits).unwrap_or(0);
    format!("{}{}", value / base.powi(power as i32), names[power])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(points: &[(f64, f64)]) -> Series {
        Series::new("line", points.iter().copied())
    }

    fn plot(crossovers: bool) -> Plot {
        Plot {
            title: "Costs".into(),
            x_label: "pages".into(),
            y_label: "instructions".into(),
            series: vec![
                Series::new("flat", [1.0, 16.0, 256.0, 4096.0].map(|x| (x, 3000.0))),
                Series::new("steep & long", [1.0, 16.0, 256.0, 4096.0].map(|x| (x, 100.0 * x))).dashed(),
            ],
            crossovers,
        }
    }

    #[test]
    fn lines_cross_where_their_logarithms_do() {
        let flat = line(&[(1.0, 1000.0), (100.0, 1000.0)]);
        let steep = line(&[(1.0, 100.0), (100.0, 10_000.0)]);
        let [(x, y)] = crossovers(&flat, &steep)[..] else { panic!() };
        assert!((x - 10.0).abs() < 1e-9 && (y - 1000.0).abs() < 1e-9, "{x} {y}");
        // With points of their own.
        let steep = line(&[(1.0, 100.0), (2.0, 200.0), (50.0, 5000.0)]);
        let [(x, _)] = crossovers(&flat, &steep)[..] else { panic!() };
        assert!((x - 10.0).abs() < 1e-9, "{x}");
    }

    #[test]
    fn lines_that_touch_do_not_cross() {
        let flat = line(&[(1.0, 4.0), (2.0, 4.0), (4.0, 4.0), (8.0, 4.0)]);
        assert_eq!(crossovers(&flat, &line(&[(1.0, 2.0), (2.0, 4.0), (4.0, 2.0)])), []);
        assert_eq!(crossovers(&flat, &line(&[(1.0, 2.0), (2.0, 4.0), (4.0, 4.0), (8.0, 5.0)])), [(2.0, 4.0)]);
        assert_eq!(crossovers(&flat, &line(&[(1.0, 2.0), (2.0, 5.0), (4.0, 5.0), (8.0, 2.0)])).len(), 2);
        // What is beyond the end of one of them is not known.
        assert_eq!(crossovers(&flat, &line(&[(0.5, 2.0), (1.0, 3.0), (9.0, 3.5), (10.0, 5.0)])), []);
        assert_eq!(crossovers(&flat, &flat), []);
    }

    #[test]
    fn a_plot_shows_its_lines_and_is_always_the_same() {
        let svg = plot(false).svg().unwrap();
        assert_eq!(svg, plot(false).svg().unwrap());
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{svg}");
        for text in ["Costs", "pages", "instructions", "flat", "steep &amp; long", "4Ki", "100k"] {
            assert!(svg.lines().any(|line| line.trim() == text), "{text} in {svg}");
        }
        assert!(svg.len() < 20_000, "{}", svg.len());
    }

    #[test]
    fn crossovers_are_marked_with_their_place() {
        let (without, with) = (plot(false).svg().unwrap(), plot(true).svg().unwrap());
        assert!(with.lines().any(|line| line.trim() == "30"), "{with}");
        assert!(!without.lines().any(|line| line.trim() == "30"));
    }

    #[test]
    fn what_is_not_above_zero_is_left_out() {
        let mut plot = plot(false);
        plot.series = vec![line(&[(0.0, 1.0), (1.0, 0.0)])];
        assert!(plot.svg().is_err());
        plot.series = vec![line(&[(8.0, 2.0), (0.0, 1.0)])];
        plot.svg().unwrap();
    }

    #[test]
    fn axes() {
        assert_eq!(powers_of_two((1.0, 8.0)).1, [1.0, 2.0, 4.0, 8.0]);
        assert_eq!(powers_of_two((3.0, 17.0)).1, [4.0, 8.0, 16.0]);
        assert!(powers_of_two((1.0, 1e12)).1.len() <= 14);
        assert_eq!(powers_of_ten((226.0, 226.0)), (200.0..500.0, vec![200.0, 500.0]));
        assert_eq!(powers_of_ten((100.0, 100.0)).0, 100.0..200.0);
        assert_eq!(powers_of_ten((30.0, 900.0)), (20.0..1000.0, vec![20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]));
        assert_eq!(powers_of_ten((0.3, 45_000.0)), (0.2..50_000.0, vec![1.0, 10.0, 100.0, 1000.0, 10_000.0]));
        assert_eq!(unit(4096.0, 1024.0, ["", "Ki", "Mi", "Gi"]), "4Ki");
        assert_eq!(unit(0.5, 1000.0, ["", "k", "M", "G"]), "0.5");
        assert_eq!(unit(2e10, 1000.0, ["", "k", "M", "G"]), "20G");
    }
}
