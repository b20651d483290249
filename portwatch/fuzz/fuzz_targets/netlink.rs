#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| portwatch::fuzzing::netlink(data));
