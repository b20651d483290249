//! Processes that do not end, end late, or let go of a port without ending.

use crate::Test;

pub fn trials() -> Vec<Test> {
    Vec::new()
}
