//! Real containers with published ports: their proxy lives, they are named, and they stop on demand.

use crate::Test;

pub fn trials() -> Vec<Test> {
    Vec::new()
}
