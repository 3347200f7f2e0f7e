// Entry from the bootloader: from unknown caches and no tables to Rust.
//
// Follows the arm64 Linux boot protocol (Documentation/arch/arm64/booting.rst): MMU off, x0 = device tree, the image
// itself clean to the point of coherency, anything behind it unknown. Rust must not run before the MMU is on: atomics are
// undefined on Device memory.

// Descriptor and register values of the first tables.
.set BOOT_BLOCK,        0x0000000000000705  // block, MAIR index 1 (Normal WB), inner shareable, AF
.set BOOT_TABLE,        0x3
.set BOOT_MAIR,         0x000000000044ff04  // as ravelin_pgtable: 0 = Device-nGnRE, 1 = Normal WB, 2 = Normal NC
.set BOOT_TCR_EL2,      0x0000000080803510  // RES1, 4 KiB granule, WB inner shareable walks, 48-bit addresses
.set BOOT_TCR_EL1,      0x0000000080903510  // the same without a second range (EPD1)
.set BOOT_SCTLR_EL2,    0x0000000030c50830  // RES1 bits: MMU and caches off, little-endian
.set BOOT_SCTLR_EL1,    0x0000000030d00800
.set SCTLR_ON,          0x0000000000001005  // M, C, I

.section .head, "ax"
.global _start
_start:
    b       primary_entry               // code0
    .long   0                           // code1
    .quad   0                           // text_offset
    .quad   image_size                  // from the link script
    .quad   0xa                         // flags: little-endian, 4 KiB pages, anywhere in memory
    .quad   0, 0, 0
    .ascii  "ARM\x64"
    .long   0

.section .text.boot, "ax"
primary_entry:
    hint    #34                         // bti c
    mov     x20, x0                     // device tree
    adrp    x21, image_start            // where we are
    msr     daifset, #0xf
    mrs     x22, CurrentEL
    lsr     x22, x22, #2
    cmp     x22, #2
    b.hi    halt                        // EL3 is firmware's
    b.ne    1f
    // HCR_EL2 decides how the other registers look (E2H): put it first. RW only.
    mov     x0, #(1 << 31)
    msr     hcr_el2, x0
    isb
    mrs     x0, hcr_el2
    tbnz    x0, #34, halt               // E2H is RES1: no EL2 of the kind this image is made for
    msr     tpidr_el2, xzr
    ldr     x0, =BOOT_SCTLR_EL2
    msr     sctlr_el2, x0
    b       2f
1:  ldr     x0, =BOOT_SCTLR_EL1
    msr     sctlr_el1, x0
2:  isb

    // No dirty line of an earlier user may later be evicted over what is written now with the caches off.
    adrp    x0, bss_start
    add     x0, x0, :lo12:bss_start
    adrp    x1, boot_end
    bl      dcache_invalidate

    adrp    x0, bss_start
    add     x0, x0, :lo12:bss_start
    adrp    x1, boot_end
3:  stp     xzr, xzr, [x0], #16
    cmp     x0, x1
    b.lo    3b

    mov     x0, x21
    mov     x1, x21
    bl      relocate

    // The first tables: the image's 2 MiB (two blocks, if it is not aligned) and the device tree's, which may be 2 MiB
    // long (booting.rst). All of them identity-mapped.
    adrp    x23, boot_tables            // L0
    add     x24, x23, #4096             // next free table
    ldr     x25, =BOOT_BLOCK
    mov     x26, #(1 << 54)             // XN
    cmp     x22, #2
    b.ne    4f
    orr     x25, x25, #(1 << 6)         // AP[1] is RES1 at EL2 and would mean EL0 at EL1
4:  mov     x0, x21
    mov     x1, x25
    bl      boot_map_block
    adrp    x0, boot_end
    sub     x0, x0, #1
    mov     x1, x25
    bl      boot_map_block
    orr     x25, x25, x26
    orr     x25, x25, #(1 << 7)         // read-only
    mov     x0, x20
    mov     x1, x25
    bl      boot_map_block
    mov     x0, #0x1fffff
    add     x0, x20, x0
    mov     x1, x25
    bl      boot_map_block
    adrp    x0, boot_tables_next
    str     x24, [x0, :lo12:boot_tables_next]

    // What was written with the caches off must not be hidden by a line that was there before.
    mov     x0, x21
    adrp    x1, boot_end
    bl      dcache_invalidate

    // Physical address size as implemented, 48 bits at most.
    mrs     x0, id_aa64mmfr0_el1
    and     x0, x0, #0xf
    mov     x1, #5
    cmp     x0, x1
    csel    x0, x0, x1, lo
    adrp    x2, vectors
    ldr     x3, =BOOT_MAIR
    cmp     x22, #2
    b.ne    5f
    msr     mair_el2, x3
    ldr     x4, =BOOT_TCR_EL2
    orr     x4, x4, x0, lsl #16
    msr     tcr_el2, x4
    msr     ttbr0_el2, x23
    msr     vbar_el2, x2
    dsb     ish                         // table writes before walks
    tlbi    alle2
    ic      iallu
    dsb     nsh
    isb
    mrs     x4, sctlr_el2
    mov     x5, #SCTLR_ON
    orr     x4, x4, x5
    msr     sctlr_el2, x4
    b       6f
5:  msr     mair_el1, x3
    ldr     x4, =BOOT_TCR_EL1
    orr     x4, x4, x0, lsl #32
    msr     tcr_el1, x4
    msr     ttbr0_el1, x23
    msr     vbar_el1, x2
    dsb     ish
    tlbi    vmalle1
    ic      iallu
    dsb     nsh
    isb
    mrs     x4, sctlr_el1
    mov     x5, #SCTLR_ON
    orr     x4, x4, x5
    msr     sctlr_el1, x4
6:  isb
    msr     spsel, #1
    adrp    x0, boot_stack_top
    mov     sp, x0
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x20
    mov     x1, x21
    mov     x2, x22
    bl      boot_main
halt:
    wfi
    b       halt

// Maps the 2 MiB block around x0 with the block attributes x1. x23 = L0 table, x24 = next free table. Clobbers x0-x7.
// Bits 11 to 2 of a table descriptor, which the walker ignores, count the entries in use below it, as ravelin_pgtable does.
boot_map_block:
    lsr     x0, x0, #21
    lsl     x0, x0, #21
    mov     x2, x23
    mov     x3, #39                     // shift of the level
    mov     x6, xzr                     // descriptor that points to the table x2
7:  lsr     x4, x0, x3
    and     x4, x4, #0x1ff
    add     x4, x2, x4, lsl #3
    ldr     x5, [x4]
    cbnz    x5, 9f                      // the image's mapping stays when the device tree shares its block
    cmp     x3, #21
    b.eq    8f
    orr     x5, x24, #BOOT_TABLE
    add     x24, x24, #4096
    b       10f
8:  orr     x5, x0, x1
10: str     x5, [x4]
    cbz     x6, 9f
    ldr     x7, [x6]
    add     x7, x7, #(1 << 2)
    str     x7, [x6]
9:  cmp     x3, #21
    b.eq    11f
    mov     x6, x4
    and     x2, x5, #0x0000fffffffff000
    sub     x3, x3, #9
    b       7b
11: ret

// Adds x1 to each word of the image at x0 that holds an address, as the RELR relocations list them: an even entry is the
// offset of such a word, an odd one has a bit for each of the 63 words that follow. Clobbers x2-x7.
.global relocate
relocate:
    hint    #34                         // bti c
    adrp    x2, relr_start
    add     x2, x2, :lo12:relr_start
    adrp    x3, relr_end
    add     x3, x3, :lo12:relr_end
1:  cmp     x2, x3
    b.hs    5f
    ldr     x5, [x2], #8
    tbnz    x5, #0, 2f
    add     x4, x0, x5
    ldr     x6, [x4]
    add     x6, x6, x1
    str     x6, [x4], #8
    b       1b
2:  mov     x7, x4
3:  lsr     x5, x5, #1
    cbz     x5, 4f
    tbz     x5, #0, 6f
    ldr     x6, [x7]
    add     x6, x6, x1
    str     x6, [x7]
6:  add     x7, x7, #8
    b       3b
4:  add     x4, x4, #(63 * 8)
    b       1b
5:  ret

// Invalidates the data cache lines from x0 up to x1 to the point of coherency. Clobbers x0, x2, x3.
dcache_invalidate:
    mrs     x2, ctr_el0
    ubfx    x2, x2, #16, #4             // DminLine: words, as a power of two
    mov     x3, #4
    lsl     x2, x3, x2
    sub     x3, x2, #1
    bic     x0, x0, x3
1:  dc      ivac, x0
    add     x0, x0, x2
    cmp     x0, x1
    b.lo    1b
    dsb     sy
    ret

// Leaves the first tables and the place the bootloader chose. x0 = &CpuStart of this CPU, x1 = argument, x2 = top of
// another stack to use for now, or 0.
// The new tables map other memory at the same addresses and with other block sizes: the MMU is off between the two
// (Arm ARM DDI 0487, D8.17.1 "Using break-before-make when updating translation table entries").
.global switch_to_carveout
switch_to_carveout:
    hint    #34                         // bti c
    mov     x19, x1
    mov     x20, x2
    mrs     x2, sctlr_el2
    mov     x3, #SCTLR_ON
    bic     x2, x2, x3
    // Everything still dirty that the way there needs is read with the MMU off: CpuStart and code are clean to the PoC.
    dsb     sy
    msr     sctlr_el2, x2
    isb
    // Go on in the copy: it lies as far from its vectors as we do from ours.
    adrp    x2, vectors
    adr     x3, cpu_start
    sub     x2, x2, x3
    ldr     x3, [x0, #48]
    sub     x3, x3, x2
    br      x3

// PSCI entry of a CPU that was turned on or resumes: x0 = &CpuStart of this CPU, MMU and caches off.
.global secondary_entry
secondary_entry:
    hint    #34                         // bti c
    mov     x19, xzr
    mov     x20, xzr
    msr     daifset, #0xf
    mov     x2, #(1 << 31)
    msr     hcr_el2, x2
    isb
    ldr     x2, =BOOT_SCTLR_EL2
    msr     sctlr_el2, x2
    isb
cpu_start:
    hint    #36                         // bti j
    ldp     x2, x3, [x0]                // ttbr0_el2, tcr_el2
    ldp     x4, x5, [x0, #16]           // mair_el2, sctlr_el2
    ldp     x6, x7, [x0, #32]           // stack top, entry
    ldr     x8, [x0, #48]               // vectors
    msr     ttbr0_el2, x2
    msr     tcr_el2, x3
    msr     mair_el2, x4
    msr     vbar_el2, x8
    msr     tpidr_el2, x0
    isb
    tlbi    alle2
    ic      iallu
    dsb     nsh
    isb
    msr     sctlr_el2, x5
    isb
    msr     spsel, #1
    cmp     x20, #0
    csel    x6, x6, x20, eq
    mov     sp, x6
    mov     x29, xzr
    mov     x30, xzr
    mov     x1, x19
    blr     x7
    b       halt

// Enters the host: x0 = its entry point, x1 = its x0, x2 = SPSR_EL2, x3 = top of this CPU's stack, which the next
// exception finds empty. Every other register is zero, so that nothing of EL2 shows.
.global enter_host
enter_host:
    hint    #34                         // bti c
    msr     elr_el2, x0
    msr     spsr_el2, x2
    mov     sp, x3
    mov     x0, x1
    mov     x1, xzr
    mov     x2, xzr
    mov     x3, xzr
    mov     x4, xzr
    mov     x5, xzr
    mov     x6, xzr
    mov     x7, xzr
    mov     x8, xzr
    mov     x9, xzr
    mov     x10, xzr
    mov     x11, xzr
    mov     x12, xzr
    mov     x13, xzr
    mov     x14, xzr
    mov     x15, xzr
    mov     x16, xzr
    mov     x17, xzr
    mov     x18, xzr
    mov     x19, xzr
    mov     x20, xzr
    mov     x21, xzr
    mov     x22, xzr
    mov     x23, xzr
    mov     x24, xzr
    mov     x25, xzr
    mov     x26, xzr
    mov     x27, xzr
    mov     x28, xzr
    mov     x29, xzr
    mov     x30, xzr
    eret
    dsb     nsh                         // no speculation past ERET
    isb

.section .boot, "aw", %nobits
.balign 4096
.global boot_tables
boot_tables:
    .skip   4096 * 32                   // L0 first; boot_map_block takes six at most, Rust the rest
.global boot_tables_end
boot_tables_end:
    .skip   4096 * 8                    // first stack; too deep a one would write over tables, so `--dev` optimises a little
boot_stack_top:
.global boot_tables_next
boot_tables_next:
    .skip   16
