//! Servers of a master and workers: the master is told to end, and takes its workers along. What is done to relatives of
//! a holder (`--tree`, `--group`), what is shown and asked before, and what is picked from a list.

mod family;
mod person;
mod servers;

use crate::Test;

pub fn trials() -> Vec<Test> {
    [servers::trials(), family::trials(), person::trials()].into_iter().flatten().collect()
}
