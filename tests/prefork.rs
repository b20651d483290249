//! Servers of a master and workers: the master is told to end, and takes its workers along.

use crate::Test;

pub fn trials() -> Vec<Test> {
    Vec::new()
}
