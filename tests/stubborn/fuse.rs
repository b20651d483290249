//! A file system whose server takes requests and never answers: who waits for it is beyond any signal.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::puppet::wait_readable;
use crate::subject::skip;

/// `FUSE_MIN_READ_BUFFER` (linux/fuse.h): smaller reads are refused.
const BUFFER_BYTES: usize = 128 * 1024;

pub struct Dead {
    device: File,
    path: PathBuf,
}

impl Dead {
    pub fn mount(path: &Path) -> Option<Dead> {
        fs::create_dir(path).expect("mkdir");
        let device = match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                skip("fuse", &format!("/dev/fuse: {error}"));
                return None;
            }
        };
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        if let Err(errno) = mount(Some("dead"), path, Some("fuse"), flags, Some(options.as_str())) {
            skip("fuse", &format!("mount: {errno}"));
            return None;
        }
        let mut dead = Dead { device, path: path.to_owned() };
        let init = dead.request();
        // struct fuse_out_header {len, error, unique} and fuse_init_out of protocol 7.23 and later, 64 bytes:
        // version 7.31, and everything else 0 but the size of a write.
        let mut reply = Vec::new();
        reply.extend(80u32.to_ne_bytes());
        reply.extend(0i32.to_ne_bytes());
        reply.extend(&init[8..16]);
        reply.extend(7u32.to_ne_bytes());
        reply.extend(31u32.to_ne_bytes());
        reply.resize(80, 0);
        reply[16 + 20..16 + 24].copy_from_slice(&4096u32.to_ne_bytes());
        dead.device.write_all(&reply).expect("FUSE_INIT");
        Some(dead)
    }

    fn request(&mut self) -> Vec<u8> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let length = self.device.read(&mut buffer).expect("/dev/fuse");
        buffer.truncate(length);
        buffer
    }

    /// Takes the next request, which thus can no longer be given up.
    pub fn await_request(&self) {
        assert!(wait_readable(&self.device), "nobody asks");
        let mut buffer = vec![0; BUFFER_BYTES];
        assert!((&self.device).read(&mut buffer).expect("/dev/fuse") > 0);
    }
}

impl Drop for Dead {
    fn drop(&mut self) {
        // Whoever waits gets an error when the device is closed, right after this.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH | MntFlags::MNT_FORCE);
    }
}
