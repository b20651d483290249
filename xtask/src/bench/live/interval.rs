//! How sure a median is.

use super::super::quantile;

/// A median, and the interval that covers that of the whole with 95 % certainty. It is told by ranks alone, so nothing is
/// supposed about how the values are spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Estimate {
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Estimate {
    /// The values must not be empty. Of fewer than six no two are 95 % certain: then these are the extremes.
    pub(super) fn of(values: &[f64]) -> Estimate {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = ranks(sorted.len());
        Estimate { median: quantile(&mut sorted, 0.5), low: sorted[low], high: sorted[high] }
    }

    /// The same in percent, without one.
    pub(super) fn percent(self) -> String {
        let Estimate { median, low, high } = self;
        format!("{median:+.2} ({low:+.2} … {high:+.2})")
    }
}

/// The ranks, from 0, of the interval's ends: so many of `count` values lie below the true median as heads fall in `count`
/// throws of a coin. The normal approximation of that, rounded outwards.
fn ranks(count: usize) -> (usize, usize) {
    #[expect(clippy::cast_precision_loss, reason = "a few hundred values")]
    let half_width = 1.96 * (count as f64).sqrt() / 2.0;
    #[expect(clippy::cast_precision_loss, reason = "a few hundred values")]
    let low = count as f64 / 2.0 - half_width;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and below the count")]
    let low = low.max(1.0).floor() as usize - 1;
    (low, count - 1 - low)
}

/// Of blocks that took turns, how each that was `on` compares with the `off` before and the one after it: ratios, without
/// one, in percent. There is one `off` more than there are `on`.
pub(super) fn changes(off: &[f64], on: &[f64]) -> Vec<f64> {
    off.windows(2).zip(on).map(|(off, on)| (on / ((off[0] + off[1]) / 2.0) - 1.0) * 100.0).collect()
}

/// The same where nothing was changed: each `off` but the first and the last against its neighbours. What a change must
/// exceed to be seen.
pub(super) fn noise(off: &[f64]) -> Vec<f64> {
    off.windows(3).map(|off| (off[1] / ((off[0] + off[2]) / 2.0) - 1.0) * 100.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_ranks_of_what_was_measured() {
        // Never narrower than the tables of the sign test: all of 6, the 2nd to 9th of 10, the 6th to 15th of 20, the 40th
        // to 61st of 100.
        for (count, want) in [(1, (0, 0)), (6, (0, 5)), (10, (0, 9)), (20, (4, 15)), (100, (39, 60))] {
            assert_eq!(ranks(count), want, "of {count}");
        }
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(Estimate::of(&values), Estimate { median: 51.0, low: 40.0, high: 61.0 });
    }

    #[test]
    fn a_drift_of_the_machine_is_no_change() {
        assert_eq!(changes(&[100.0, 200.0, 300.0], &[150.0, 250.0]), [0.0, 0.0]);
        assert_eq!(changes(&[100.0, 100.0], &[101.0]).iter().map(|it| it.round()).collect::<Vec<_>>(), [1.0]);
        assert_eq!(noise(&[100.0, 200.0, 300.0]), [0.0]);
        assert!(noise(&[100.0, 100.0]).is_empty());
    }
}
