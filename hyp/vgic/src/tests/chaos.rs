//! A guest, a host and a CPU that keep to no rules.

use proptest::prelude::*;

use super::world::{GICD, World, prepare, rd, sgi};
use crate::{Access, Frame, ListRegisters, Outcome, SgiRegister, ich::MAX_LIST_REGISTERS};

#[derive(Clone, Debug)]
enum Op {
    Access(usize, Frame, u64, Access),
    Sgi(usize, u8, u64),
    Dir(usize, u64),
    Spi(u32, bool),
    Ppi(usize, u32, bool),
    Enter(usize, usize),
    Exit(usize, ListRegisters),
    ExitAsEntered(usize),
    ResetVcpu(usize),
    ResetInterface(usize),
}

fn frame() -> impl Strategy<Value = Frame> {
    prop_oneof![3 => Just(GICD), 1 => (0_usize..4).prop_map(rd), 2 => (0_usize..4).prop_map(sgi)]
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0_u64..0x400).prop_map(|word| word * 4),
        2 => (0_u64..0x400).prop_map(|n| 0x6000 + n * 8),
        1 => (0_u64..0x20).prop_map(|word| word * 4),
        1 => 0_u64..0x2_0000,
        1 => any::<u64>(),
    ]
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), (0_u32..64).prop_map(|bit| 1 << bit), Just(u64::MAX), 0_u64..1100]
}

fn access() -> impl Strategy<Value = Access> {
    let size = prop_oneof![6 => Just(4_u8), 1 => Just(8), 1 => Just(1), 1 => any::<u8>()];
    (size, value(), any::<bool>()).prop_map(|(size, value, write)| match write {
        true => Access::Write { size, value },
        false => Access::Read { size },
    })
}

fn state() -> impl Strategy<Value = ListRegisters> {
    let words = (any::<[u64; MAX_LIST_REGISTERS]>(), any::<usize>(), any::<[u64; 2]>(), any::<[[u32; 4]; 2]>());
    words.prop_map(|(lrs, used, [hcr, vmcr], [ap0r, ap1r])| ListRegisters { lrs, used, hcr, vmcr, ap0r, ap1r })
}

fn op() -> impl Strategy<Value = Op> {
    let vcpu = || prop_oneof![8 => 0_usize..3, 1 => any::<usize>()];
    let intid = || prop_oneof![4 => 0_u32..1100, 1 => any::<u32>()];
    prop_oneof![
        12 => (vcpu(), frame(), offset(), access()).prop_map(|(v, f, o, a)| Op::Access(v, f, o, a)),
        1 => (vcpu(), 0_u8..3, any::<u64>()).prop_map(|(v, r, x)| Op::Sgi(v, r, x)),
        1 => (vcpu(), value()).prop_map(|(v, x)| Op::Dir(v, x)),
        4 => (intid(), any::<bool>()).prop_map(|(i, on)| Op::Spi(i, on)),
        1 => (vcpu(), intid(), any::<bool>()).prop_map(|(v, i, on)| Op::Ppi(v, i, on)),
        4 => (vcpu(), prop_oneof![0_usize..20, any::<usize>()]).prop_map(|(v, n)| Op::Enter(v, n)),
        2 => (vcpu(), state()).prop_map(|(v, s)| Op::Exit(v, s)),
        2 => vcpu().prop_map(Op::ExitAsEntered),
        1 => vcpu().prop_map(Op::ResetVcpu),
        1 => vcpu().prop_map(Op::ResetInterface),
    ]
}

proptest! {
    #![proptest_config(super::config())]

    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn nothing_panics(spis in prop::sample::select(vec![32_usize, 96, 992]), ops in prop::collection::vec(op(), 1..200)) {
        let mut world = World::reset(3, spis, 4);
        for intid in 32..1020 {
            let given = world.gic().give_to_host(intid);
            prop_assert_eq!(given.is_ok(), intid < 32 + spis as u32);
        }
        let mut entered = [ListRegisters::default(); 3];
        for op in ops {
            let mut gic = world.gic();
            match op {
                Op::Access(vcpu, frame, offset, access) => {
                    if let Ok(Outcome::Done { value, kick }) = gic.mmio(vcpu, frame, offset, access) {
                        prop_assert!(!kick.contains(vcpu) && kick.iter().all(|vcpu| vcpu < 3));
                        let wide = matches!(access, Access::Read { size: 8 });
                        prop_assert!(wide || value <= u64::from(u32::MAX));
                    }
                }
                Op::Sgi(vcpu, register, value) => {
                    let register = [SgiRegister::Sgi0, SgiRegister::Sgi1, SgiRegister::AliasSgi1][usize::from(register)];
                    prop_assert!(gic.send_sgi(vcpu, register, value).iter().all(|vcpu| vcpu < 3));
                }
                Op::Dir(vcpu, value) => {
                    let _ = gic.write_dir(vcpu, value);
                }
                Op::Spi(intid, level) => {
                    prop_assert_eq!(gic.raise_spi(intid, level).is_ok(), (32..1020.min(32 + spis as u32)).contains(&intid));
                }
                Op::Ppi(vcpu, intid, level) => {
                    prop_assert_eq!(gic.set_ppi_level(vcpu, intid, level).is_ok(), (16..32).contains(&intid));
                }
                Op::Enter(vcpu, lrs) => {
                    if let Some(entry) = prepare(&mut gic, vcpu, lrs) {
                        prop_assert!(entry.used <= lrs.clamp(1, 16));
                        prop_assert!(entry.lrs[entry.used..].iter().all(|&lr| lr == 0));
                        entered[vcpu] = entry;
                    }
                }
                Op::Exit(vcpu, state) => {
                    let _ = gic.after_exit(vcpu, &state);
                }
                Op::ExitAsEntered(vcpu) => {
                    let _ = gic.after_exit(vcpu, &entered.get(vcpu).copied().unwrap_or_default());
                }
                Op::ResetVcpu(vcpu) => {
                    let _ = gic.reset_vcpu(vcpu);
                }
                Op::ResetInterface(vcpu) => {
                    let _ = gic.reset_interface(vcpu);
                }
            }
            let _ = (0..4).map(|vcpu| gic.wakes(vcpu)).max();
            world.check();
        }
    }

    /// Storage with any contents, as after a mistake of the caller's, can do no more than deliver nonsense.
    #[test]
    #[cfg_attr(miri, ignore = "takes Miri too long")]
    fn garbage_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 64), ops in prop::collection::vec(op(), 1..60)) {
        let mut world = World::reset(3, 64, 4);
        world.scramble(&bytes);
        for op in ops {
            let mut gic = world.gic();
            match op {
                Op::Access(vcpu, frame, offset, access) => {
                    let _ = gic.mmio(vcpu, frame, offset, access);
                }
                Op::Enter(vcpu, lrs) => {
                    let _ = prepare(&mut gic, vcpu, lrs);
                }
                Op::Exit(vcpu, state) => {
                    let _ = gic.after_exit(vcpu, &state);
                }
                Op::Sgi(vcpu, _, value) => {
                    let _ = gic.send_sgi(vcpu, SgiRegister::Sgi1, value);
                }
                _ => {
                    let _ = gic.wakes(0);
                }
            }
        }
    }
}
