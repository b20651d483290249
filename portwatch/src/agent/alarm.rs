//! A timer by the clock of deadlines, CLOCK_BOOTTIME, which goes on while the host sleeps.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::model::BootNs;
use crate::source::process;

/// Made when it is needed for the first time.
#[derive(Debug, Default)]
pub(super) struct Alarm {
    timer: Option<AsyncFd<OwnedFd>>,
    /// What the timer is set to.
    set: Option<BootNs>,
}

impl Alarm {
    /// Returns at this time, or at once where that is over; never without one. Cancel safe, and asked for the same time
    /// again it has nothing to do.
    pub(super) async fn until(&mut self, deadline: Option<BootNs>) {
        let Some(at) = deadline else { return std::future::pending().await };
        loop {
            let left = at.saturating_sub(process::boot_ns_now());
            if left == 0 {
                return;
            }
            match self.timer(at) {
                Ok(timer) => match timer.readable().await {
                    // That it was readable for what it was set to before does not count.
                    Ok(mut ready) => ready.clear_ready(),
                    Err(_) => return std::future::pending().await,
                },
                // Out of descriptors: late by as long as the host sleeps.
                Err(_) => tokio::time::sleep(Duration::from_nanos(left)).await,
            }
        }
    }

    fn timer(&mut self, at: BootNs) -> std::io::Result<&AsyncFd<OwnedFd>> {
        let timer = match self.timer.take() {
            Some(timer) => timer,
            None => {
                let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
                self.set = None;
                let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
                // SAFETY: an `OwnedFd` keeps its descriptor open until it is dropped, which the `AsyncFd` is with it.
                unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) }?
            }
        };
        if self.set != Some(at) {
            let seconds = i64::try_from(at / 1_000_000_000).unwrap_or(i64::MAX);
            let it_value = Timespec { tv_sec: seconds, tv_nsec: (at % 1_000_000_000) as i64 };
            let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
            timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval, it_value })?;
            self.set = Some(at);
        }
        Ok(self.timer.insert(timer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_returns_at_each_time_and_not_before() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut alarm = Alarm::default();
            let start = process::boot_ns_now();
            // One that is over, some that follow, one that is given up, and the next after that.
            for after in [0, 20_000_000, 30_000_000] {
                alarm.until(Some(start + after)).await;
                assert!(process::boot_ns_now() >= start + after);
            }
            let hour = start + 3_600_000_000_000;
            tokio::select! {
                biased;
                () = alarm.until(Some(hour)) => panic!("an hour is not over"),
                () = tokio::task::yield_now() => {}
            }
            alarm.until(Some(start + 50_000_000)).await;
            let now = process::boot_ns_now();
            assert!((start + 50_000_000..hour).contains(&now));
        });
    }
}
