//! Which device is at an address.

use std::sync::Arc;

use crate::layout::DEVICE_SIZE;

/// A device with registers in memory. Data are little-endian, 1 to 8 bytes.
pub trait MmioDevice: Send + Sync {
    /// A load. Bytes that are left alone read as zero.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// A store.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The devices.
#[derive(Default)]
pub struct Bus(Vec<(u64, Arc<dyn MmioDevice>)>);

impl std::fmt::Debug for Bus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_list().entries(self.0.iter().map(|(address, _)| address)).finish()
    }
}

impl Bus {
    /// Adds a device whose window of [`DEVICE_SIZE`] bytes begins at `address`.
    pub fn insert(&mut self, address: u64, device: Arc<dyn MmioDevice>) {
        self.0.push((address, device));
    }

    /// A load from `address`. False if no device is there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0);
        self.find(address, data.len()).map(|(device, offset)| device.read(offset, data)).is_some()
    }

    /// A store to `address`. False if no device is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        self.find(address, data.len()).map(|(device, offset)| device.write(offset, data)).is_some()
    }

    fn find(&self, address: u64, length: usize) -> Option<(&dyn MmioDevice, u64)> {
        self.0.iter().find_map(|(start, device)| {
            let offset = address.checked_sub(*start)?;
            let end = offset.checked_add(length as u64)?;
            (end <= DEVICE_SIZE).then_some((device.as_ref(), offset))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl MmioDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }

        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn a_device_has_its_window_alone() {
        let mut bus = Bus::default();
        bus.insert(0x1000, Arc::new(Echo));
        let mut data = [0xff; 4];
        assert!(bus.read(0x1ffc, &mut data));
        assert_eq!(data, [0xfc, 0, 0, 0]);
        assert!(!bus.read(0x1ffd, &mut data));
        assert!(!bus.read(0xffc, &mut data));
        assert!(!bus.write(u64::MAX, &data));
        assert!(bus.write(0x1000, &data));
    }
}
