//! The bytes of [`KERNEL_BTF`]: 5 MB and more, which the kernel hands out a page at a time to those who read. Since 6.16 it
//! lets them be mapped, so that nothing is copied.

use std::fs::{self, File};
use std::io;
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::slice;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::KERNEL_BTF;

/// The running kernel's BTF.
#[derive(Debug)]
pub struct KernelBytes(Bytes);

#[derive(Debug)]
enum Bytes {
    Mapped(Mapping),
    Read(Vec<u8>),
}

impl KernelBytes {
    pub(super) fn open() -> io::Result<KernelBytes> {
        let file = File::open(KERNEL_BTF)?;
        Ok(KernelBytes(match Mapping::of(&file) {
            Ok(mapping) => Bytes::Mapped(mapping),
            Err(_) => Bytes::Read(fs::read(KERNEL_BTF)?),
        }))
    }
}

impl Deref for KernelBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            // SAFETY: mapped for reading at this length until it is dropped. The kernel's types do not change while it runs.
            Bytes::Mapped(mapping) => unsafe { slice::from_raw_parts(mapping.start.as_ptr(), mapping.len) },
            Bytes::Read(bytes) => bytes,
        }
    }
}

#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn of(file: &File) -> io::Result<Mapping> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        // SAFETY: a mapping at an address that the kernel chooses takes the place of no other memory.
        let start = unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::PRIVATE, file, 0)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Mapping { start, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this very mapping, to which nothing refers any more. It can only fail for another range.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_is_what_is_read() {
        let Ok(read) = fs::read(KERNEL_BTF) else { return eprintln!("SKIPPED: no {KERNEL_BTF}") };
        assert!(*KernelBytes::open().unwrap() == read);
    }
}
