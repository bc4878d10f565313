//! Progress of a deployment on stderr: bars on a terminal, else lines.

mod bars;
mod lines;

use std::io::{self, IsTerminal as _};

use vmcast_common::units::Rate;
use vmcast_proto::v1::{self, deployment::State, target_status};

use self::{bars::Bars, lines::Lines};
use crate::{
    format::{count, seconds},
    output::Output,
    view::published,
    watch::Seen,
};

/// How progress is shown.
#[derive(Debug)]
pub(crate) enum Progress {
    Bars(Box<Bars>),
    Lines(Lines),
    /// A program reads, and nobody looks at stderr.
    Silent,
}

impl Progress {
    pub(crate) fn new(out: Output) -> Self {
        match (io::stderr().is_terminal(), out.json) {
            (true, _) => Self::Bars(Box::new(Bars::new())),
            (false, false) => Self::Lines(Lines::new(|line| {
                let _ = io::Write::write_all(&mut io::stderr().lock(), format!("{line}\n").as_bytes());
            })),
            (false, true) => Self::Silent,
        }
    }

    pub(crate) fn show(&mut self, seen: &Seen<'_>) {
        match self {
            Self::Bars(bars) => bars.show(seen),
            Self::Lines(lines) => lines.show(seen),
            Self::Silent => {}
        }
    }

    /// A line that stays.
    pub(crate) fn note(&mut self, line: &str) {
        match self {
            Self::Bars(bars) => bars.note(line),
            Self::Lines(lines) => lines.note(line),
            Self::Silent => {}
        }
    }

    /// Leaves the terminal as it was.
    pub(crate) fn finish(&mut self) {
        if let Self::Bars(bars) = self {
            bars.finish();
        }
    }
}

/// What all targets together have done.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Totals {
    /// Verified bytes, and those that all targets need.
    verified: u64,
    wanted: u64,
    /// Bytes per second into all targets.
    rate: f64,
    published: usize,
    copies: usize,
    receiving: usize,
    done: usize,
    failed: usize,
    targets: usize,
}

impl Totals {
    fn of(deployment: &v1::Deployment) -> Self {
        let mut totals = Self { targets: deployment.targets.len(), ..Self::default() };
        for target in &deployment.targets {
            totals.wanted = totals.wanted.saturating_add(deployment.image_data_bytes);
            totals.verified = totals.verified.saturating_add(verified(deployment, target));
            totals.published += published(target);
            totals.copies += target.copies.len();
            match target.state() {
                target_status::State::Receiving => {
                    totals.receiving += 1;
                    totals.rate += target.rate_bytes_per_second;
                }
                target_status::State::Succeeded => totals.done += 1,
                target_status::State::Failed | target_status::State::Cancelled => totals.failed += 1,
                target_status::State::Unspecified
                | target_status::State::Waiting
                | target_status::State::Copying
                | target_status::State::Starting => {}
            }
        }
        totals
    }

    /// "3 of 4 hosts done, 1 failed, 9 of 12 copies"
    fn counts(&self) -> String {
        let failed = if self.failed > 0 { format!(", {} failed", self.failed) } else { String::new() };
        format!(
            "{} of {} done{failed}, {} of {}",
            self.done,
            count(self.targets, "host", "hosts"),
            self.published,
            count(self.copies, "copy", "copies"),
        )
    }
}

/// Verified bytes of a target, never more than there are.
fn verified(deployment: &v1::Deployment, target: &v1::TargetStatus) -> u64 {
    match target.state() {
        // Whatever came from where: it has them all.
        target_status::State::Copying | target_status::State::Starting | target_status::State::Succeeded => {
            deployment.image_data_bytes
        }
        _ => target.verified_bytes.min(deployment.image_data_bytes),
    }
}

/// "12 MB/s, 8 s left", as far as that can be said.
fn pace(left: u64, rate: f64) -> String {
    if rate < 1.0 {
        return String::new();
    }
    // Only a forecast: whole seconds.
    format!(
        "{}, {} left",
        Rate(rate),
        seconds((left as f64 / rate).ceil()).replace(".00 s", " s").replace(".0 s", " s")
    )
}

fn state_word(state: target_status::State) -> &'static str {
    match state {
        target_status::State::Unspecified | target_status::State::Waiting => "waiting",
        target_status::State::Receiving => "receiving",
        target_status::State::Copying => "copying",
        target_status::State::Starting => "starting",
        target_status::State::Succeeded => "done",
        target_status::State::Failed => "FAILED",
        target_status::State::Cancelled => "cancelled",
    }
}

fn deployment_word(state: State) -> &'static str {
    match state {
        State::Unspecified => "unknown",
        State::Planning => "planning: waiting for the links to be measured",
        State::Running => "running",
        State::Succeeded => "succeeded",
        State::Partial => "partial",
        State::Failed => "failed",
        State::Cancelled => "cancelled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn deployment(targets: &[(&str, target_status::State, u64)]) -> v1::Deployment {
        let copy = |published| v1::CopyStatus { published, ..Default::default() };
        let target = |(host, state, verified): &(&str, target_status::State, u64)| v1::TargetStatus {
            host: (*host).into(),
            state: (*state).into(),
            verified_bytes: *verified,
            rate_bytes_per_second: 10.0,
            copies: vec![copy(*state == target_status::State::Succeeded); 2],
            ..Default::default()
        };
        v1::Deployment {
            id: "d1".into(),
            state: State::Running.into(),
            image_data_bytes: 100,
            targets: targets.iter().map(target).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn totals_count_every_state() {
        use target_status::State::{Copying, Failed, Receiving, Succeeded, Waiting};
        let deployment = deployment(&[
            ("a", Waiting, 0),
            ("b", Receiving, 40),
            ("c", Copying, 100),
            ("d", Succeeded, 0),
            ("e", Failed, 500),
        ]);
        let totals = Totals::of(&deployment);
        assert_eq!((totals.verified, totals.wanted), (340, 500));
        assert_eq!((totals.receiving, totals.done, totals.failed), (1, 1, 1));
        assert!((totals.rate - 10.0).abs() < 1e-9);
        assert_eq!(totals.counts(), "1 of 5 hosts done, 1 failed, 2 of 10 copies");
    }

    #[test]
    fn a_forecast_needs_a_rate() {
        assert_eq!(pace(100, 0.0), "");
        assert_eq!(pace(100, f64::NAN.max(0.0)), "");
        assert_eq!(pace(80_000_000, 10_000_000.0), "10 MB/s, 8 s left");
        assert_eq!(pace(1_250_000_000, 10_000_000.0), "10 MB/s, 2 min 05 s left");
    }
}
