//! The SMCs that the host may make: an allow-list, everything else gets NOT_SUPPORTED and never reaches EL3.

use arm_psci::ErrorCode;
use ravelin_memory::PhysAddr;

use crate::{
    counters::Counters,
    firmware::{Firmware, Offer, SMCCC_VERSION, Version},
    psci::{Cpu, Entries, Psci, Start, is_psci},
    registers::{Registers, call_registers, low_half, set_results},
};

/// SMCCC_ARCH_FEATURES.
const ARCH_FEATURES: u32 = 0x8000_0001;

/// Calls that are forwarded as they are: they carry no addresses and change no memory. Arm DEN0028: SMCCC_ARCH_SOC_ID,
/// SMCCC_ARCH_WORKAROUND_1 to 3.
const ARCH_CALLS: &[u32] = &[0x8000_0002, 0x8000_8000, 0x8000_7fff, 0x8000_3fff];

/// The same of Arm DEN0098: TRNG_VERSION, TRNG_FEATURES, TRNG_GET_UUID, TRNG_RND32, TRNG_RND64.
const TRNG_CALLS: &[u32] = &[0x8400_0050, 0x8400_0051, 0x8400_0052, 0x8400_0053, 0xc400_0053];

/// SMCCC's NOT_SUPPORTED. PSCI and TRNG have the same value.
const NOT_SUPPORTED: u64 = u64::MAX;

/// The door between the host and the firmware.
///
/// FF-A is refused for now: its calls name memory, so it takes a proxy that checks them against the owners of pages.
#[derive(Debug)]
pub(crate) struct Gate<'a, F> {
    firmware: F,
    offer: Offer,
    psci: Psci<'a>,
}

impl<'a, F: Firmware> Gate<'a, F> {
    pub(crate) fn new(firmware: F, cpus: &'a [Cpu], entries: Entries) -> Self {
        let offer = Offer::probe(&firmware);
        Self { firmware, offer, psci: Psci::new(cpus, entries, offer) }
    }

    pub(crate) fn take_start(&self, cpu: usize) -> Option<Start> {
        self.psci.take_start(cpu)
    }

    /// Handles `SMC #immediate` of the host on `cpu`. `is_hosts` says whether the host has access to a page of RAM.
    pub(crate) fn smc(
        &self,
        cpu: usize,
        immediate: u16,
        registers: &mut Registers,
        counters: &Counters,
        is_hosts: impl Fn(PhysAddr) -> bool,
    ) {
        let forward = |values| {
            counters.smcs_forwarded.add();
            self.firmware.smc(values)
        };
        let refuse = |registers: &mut Registers| {
            counters.smcs_refused.add();
            set_results(registers, [NOT_SUPPORTED]);
        };

        let (Some(values), 0) = (call_registers(registers), immediate) else {
            return refuse(registers);
        };
        // Firmware without SMCCC 1.1 has none of these, and might not even refuse them properly.
        let known = |calls: &[u32], function| self.offer.smccc.is_some() && calls.contains(&function);
        let [function, argument, ..] = values;
        let function = low_half(function);
        match function {
            SMCCC_VERSION => set_results(registers, [self.smccc_version().0.into()]),
            ARCH_FEATURES => match low_half(argument) {
                SMCCC_VERSION | ARCH_FEATURES => set_results(registers, [0]),
                asked if known(ARCH_CALLS, asked) => set_results(registers, forward(values)),
                _ => refuse(registers),
            },
            _ if known(ARCH_CALLS, function) || known(TRNG_CALLS, function) => set_results(registers, forward(values)),
            _ if is_psci(function) => match self.psci.call(cpu, values, forward, is_hosts) {
                Ok(x0) => set_results(registers, [x0]),
                Err(ErrorCode::NotSupported) => refuse(registers),
                Err(error) => set_results(registers, [error.into()]),
            },
            _ => refuse(registers),
        }
    }

    /// Returns the version of the convention that the host can rely on. Between host and hypervisor all of 1.1 holds whatever
    /// the firmware does: x4 to x17 are preserved, and the discovery calls are there. Beyond 1.2 would be the SVE hint.
    fn smccc_version(&self) -> Version {
        self.offer.smccc.unwrap_or(Version::V1_1).min(Version::V1_2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeFirmware, entries, modern, plain};

    struct Host<'a> {
        gate: Gate<'a, &'a FakeFirmware>,
        firmware: &'a FakeFirmware,
        counters: Counters,
    }

    impl<'a> Host<'a> {
        fn new(firmware: &'a FakeFirmware, cpus: &'a [Cpu]) -> Self {
            let gate = Gate::new(firmware, cpus, entries());
            firmware.take();
            Self { gate, firmware, counters: Counters::default() }
        }

        /// Makes a call with recognisable values in the other registers and returns x0 to x3.
        fn smc(&self, immediate: u16, values: [u64; 4]) -> [u64; 4] {
            let mut registers: Registers = core::array::from_fn(|index| 0x1000 + index as u64);
            registers[..4].copy_from_slice(&values);
            let before = registers;
            self.gate.smc(0, immediate, &mut registers, &self.counters, |_| true);
            assert_eq!(registers[4..], before[4..]);
            registers[..4].try_into().unwrap()
        }

        fn refuses(&self, immediate: u16, values: [u64; 4]) {
            let refused = self.counters.smcs_refused.get();
            let [_, x1, x2, x3] = values;
            assert_eq!(self.smc(immediate, values), [NOT_SUPPORTED, x1, x2, x3], "{values:#x?}");
            assert_eq!(self.counters.smcs_refused.get(), refused + 1);
            assert_eq!(self.firmware.take(), [[0; 4]; 0], "{values:#x?}");
        }

        fn forwards(&self, values: [u64; 4], as_seen: [u64; 4]) {
            let forwarded = self.counters.smcs_forwarded.get();
            assert_eq!(self.smc(0, values), [0, 0x11, 0x22, 0x33]);
            assert_eq!(self.counters.smcs_forwarded.get(), forwarded + 1);
            assert_eq!(self.firmware.take(), [as_seen]);
        }
    }

    #[test]
    fn what_is_not_allowed_stays_here() {
        let firmware = FakeFirmware::new(modern as _);
        let host = Host::new(&firmware, &[]);
        let kinds: &[(&str, &[u64])] = &[
            ("yielding calls", &[0, 0x400_0000, 0x4400_0003]),
            ("unknown architecture services", &[0x8000_0003, 0xc000_0002, 0x8000_4000]),
            ("CPU, SiP and OEM services", &[0x8100_0000, 0x8200_0000, 0xc200_0020, 0x8300_0000]),
            ("around PSCI and TRNG", &[0x8400_0020, 0x8400_004f, 0x8400_0054, 0xc400_0050]),
            ("FF-A", &[0x8400_0060, 0x8400_0063, 0xc400_0066, 0x8400_0090]),
            ("hypervisor services", &[0x8500_0000, 0x8600_ff01, 0xc600_1001]),
            ("trusted applications and OS", &[0xb000_0000, 0xb200_0000, 0xff00_0000, 0xffff_ffff]),
            ("the hint and reserved bits", &[0x8401_0000, 0x8402_0000, 0x8480_0000, 0xc401_0003]),
            (
                "PSCI that is not relayed",
                &[0x8400_000b, 0x8400_0013, 0x8400_0014, 0xc400_0014, 0x8400_0015, 0xc400_0015],
            ),
            ("PSCI that does not exist", &[0xc400_0000, 0xc400_0002, 0x8400_001f]),
        ];
        for (kind, numbers) in kinds {
            for &number in *numbers {
                println!("{kind}: {number:#x}");
                host.refuses(0, [number, 1, 2, 3]);
            }
        }
    }

    #[test]
    fn immediates_and_upper_halves_are_refused() {
        let firmware = FakeFirmware::new(modern as _);
        let host = Host::new(&firmware, &[]);
        for function in [0x8400_0000, 0x8000_0000, 0x8000_0001, 0x8000_8000, 0xc400_0053] {
            host.refuses(1, [function, 0, 2, 3]);
            host.refuses(0xffff, [function, 0, 2, 3]);
            host.refuses(0, [1 << 32 | function, 0, 2, 3]);
            host.refuses(0, [u64::MAX << 32 | function, 0, 2, 3]);
        }
    }

    #[test]
    fn listed_calls_reach_the_firmware() {
        let firmware = FakeFirmware::new(modern as _);
        let host = Host::new(&firmware, &[]);
        for &function in ARCH_CALLS.iter().chain(TRNG_CALLS) {
            let low = if function & 1 << 30 == 0 { 0xffff_ffff } else { u64::MAX };
            let function = u64::from(function);
            host.forwards(
                [function, 0xaaaa_5555_5555_0001, u64::MAX, 3],
                [function, 0xaaaa_5555_5555_0001 & low, low, 3],
            );
        }
        for &asked in ARCH_CALLS {
            host.forwards([0x8000_0001, 7 << 32 | u64::from(asked), 2, 3], [0x8000_0001, asked.into(), 2, 3]);
        }
    }

    #[test]
    fn discovery_is_answered_here() {
        let firmware = FakeFirmware::new(modern as _);
        let host = Host::new(&firmware, &[]);
        assert_eq!(host.smc(0, [0x8000_0000, 1, 2, 3]), [0x1_0002, 1, 2, 3]);
        assert_eq!(host.smc(0, [0x8000_0001, 0x8000_0000, 2, 3]), [0, 0x8000_0000, 2, 3]);
        assert_eq!(host.smc(0, [0x8000_0001, 0x8000_0001, 2, 3]), [0, 0x8000_0001, 2, 3]);
        assert_eq!(firmware.take(), [[0; 4]; 0]);
        host.refuses(0, [0x8000_0001, 0x8400_0050, 2, 3]);
        host.refuses(0, [0x8000_0001, 0xc600_1001, 2, 3]);
    }

    #[test]
    fn old_firmware_is_asked_for_nothing_but_psci() {
        let firmware = FakeFirmware::new(plain as _);
        let host = Host::new(&firmware, &[]);
        assert_eq!(host.smc(0, [0x8000_0000, 0, 0, 0])[0], 0x1_0001);
        assert_eq!(host.smc(0, [0x8400_000a, 0x8000_0000, 0, 0])[0], 0);
        for &function in ARCH_CALLS.iter().chain(TRNG_CALLS) {
            host.refuses(0, [function.into(), 0, 0, 0]);
            host.refuses(0, [0x8000_0001, function.into(), 0, 0]);
        }
        assert_eq!(host.smc(0, [0x8400_0000, 0, 0, 0])[0], 0x1_0001);
    }

    #[test]
    fn firmware_with_1_1_is_believed() {
        let firmware = FakeFirmware::new(
            (|registers: [u64; 4]| match registers {
                [0x8000_0000, ..] => [0x1_0001, 0, 0, 0],
                _ => modern(registers),
            }) as _,
        );
        let host = Host::new(&firmware, &[]);
        assert_eq!(host.smc(0, [0x8000_0000, 0, 0, 0])[0], 0x1_0001);
        host.forwards([0x8400_0050, 0, 0, 0], [0x8400_0050, 0, 0, 0]);
    }

    #[test]
    fn psci_changes_x0_alone() {
        let cpus = [Cpu::on(0, 0), Cpu::off(1, 0)];
        let firmware = FakeFirmware::new(modern as _);
        let host = Host::new(&firmware, &cpus);
        assert_eq!(host.smc(0, [0x8400_0006, 1, 2, 3]), [0, 1, 2, 3]);
        assert_eq!(firmware.take(), [[0x8400_0006, 1, 2, 3]]);
        assert_eq!(host.smc(0, [0xc400_0003, 99, 2, 3]), [-2_i64 as u64, 99, 2, 3]);
        assert_eq!(host.counters.smcs_refused.get(), 0);
        assert_eq!(host.counters.smcs_forwarded.get(), 1);
    }

    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config {
            cases: if cfg!(miri) { 16 } else { 1024 },
            failure_persistence: None,
            ..Default::default()
        })]

        #[test]
        fn no_registers_of_an_smc_do_harm(
            immediate in proptest::prop_oneof![proptest::strategy::Just(0_u16), proptest::arbitrary::any::<u16>()],
            function in proptest::prop_oneof![
                proptest::arbitrary::any::<u64>(),
                0x8400_0000_u64..0x8400_0100, 0xc400_0000_u64..0xc400_0100, 0x8000_0000_u64..0x8000_0010,
            ],
            arguments: [u64; 3],
        ) {
            let cpus = [Cpu::on(0, 0), Cpu::off(1, 0)];
            let firmware = FakeFirmware::new(modern as _);
            let host = Host::new(&firmware, &cpus);
            let [x1, x2, x3] = arguments;
            host.smc(immediate, [function, x1, x2, x3]);
            for [function, ..] in firmware.take() {
                assert!(immediate == 0 && u32::try_from(function).is_ok_and(|function| {
                    is_psci(function) || ARCH_CALLS.contains(&function) || TRNG_CALLS.contains(&function)
                        || function == ARCH_FEATURES
                }));
            }
        }
    }
}
