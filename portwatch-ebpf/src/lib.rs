//! The ABI between portwatch and its kernel programs: records, constants and the offsets that the programs need.
#![no_std]
