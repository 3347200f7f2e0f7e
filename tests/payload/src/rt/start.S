// Entry, translation tables, vectors and the few routines that need exact control of registers.


.arch armv8-a+fp+simd

.macro SAVE
    stp     x29, x30, [sp, #-112]!
    stp     x19, x20, [sp, #16]
    stp     x21, x22, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x25, x26, [sp, #64]
    stp     x27, x28, [sp, #80]
.endm

.macro RESTORE
    ldp     x19, x20, [sp, #16]
    ldp     x21, x22, [sp, #32]
    ldp     x23, x24, [sp, #48]
    ldp     x25, x26, [sp, #64]
    ldp     x27, x28, [sp, #80]
    ldp     x29, x30, [sp], #112
.endm

// ---------------------------------------------------------------------------------------------------------------------
// Entry. Works as an arm64 Image (header, Documentation/arch/arm64/booting) and entered at its first byte by a loader that
// knows nothing: EL1, MMU off, x0 = DTB.

.section .head, "ax"
.global _start
_start:
    b       boot
    .word   0
    .quad   0                       // text_offset
    .quad   __image_size
    .quad   0xa                     // little endian, 4 KiB pages, anywhere in RAM
    .quad   0
    .quad   0
    .quad   0
    .ascii  "ARM\x64"
    .word   0

.section .text.start, "ax"
boot:
    mrs     x21, daif
    msr     daifset, #0xf
    mov     x19, x0
    orr     x24, x1, x2
    orr     x24, x24, x3
    mrs     x20, sctlr_el1
    mrs     x22, currentel
    mrs     x23, spsel

    // Every relocation of a static PIE is R_AARCH64_RELATIVE (1027): base + addend, and the link address is 0.
    adrp    x9, _start
    adrp    x10, __rela_start
    add     x10, x10, :lo12:__rela_start
    adrp    x11, __rela_end
    add     x11, x11, :lo12:__rela_end
1:  cmp     x10, x11
    b.hs    2f
    ldp     x12, x13, [x10]
    ldr     x14, [x10, #16]
    add     x10, x10, #24
    cmp     w13, #1027
    b.ne    1b
    add     x14, x14, x9
    str     x14, [x9, x12]
    b       1b
2:
    bl      mmu_on
    msr     spsel, #1
    adrp    x9, {stacks}
    add     x9, x9, :lo12:{stacks}
    add     x9, x9, #{stack_size}
    mov     sp, x9
    mov     x29, xzr
    mov     x0, x19
    mov     x1, x20
    mov     x2, x21
    mov     x3, x22
    mov     x4, x23
    mov     x5, x24
    bl      {boot_main}
    b       .

// Where PSCI starts a secondary CPU: x0 = context id, which is the top of the CPU's stack with a tag in the low bits.
.global secondary_entry
secondary_entry:
    mov     x19, x0
    mrs     x20, sctlr_el1
    mrs     x21, daif
    mrs     x22, currentel
    mrs     x23, spsel
    bl      mmu_on
    msr     spsel, #1
    and     x9, x19, #~0xf
    mov     sp, x9
    mov     x29, xzr
    mov     x0, x19
    mov     x1, x20
    mov     x2, x21
    mov     x3, x22
    mov     x4, x23
    bl      {secondary_main}
    b       .

// A PSCI call after which the CPU may lose its state: x0 = function, x1 = first argument of CPU_SUSPEND. Returns its status;
// or 1, if the CPU came back through resume_entry, whose context id is the stack pointer.
.global call_and_resume
call_and_resume:
    SAVE
    adrp    x2, resume_entry
    add     x2, x2, :lo12:resume_entry
    mov     x3, sp
    adrp    x9, resume_context
    str     x3, [x9, :lo12:resume_context]
    smc     #0
    RESTORE
    ret
.global resume_entry
resume_entry:
    mov     x19, x0
    bl      mmu_on
    msr     spsel, #1
    mov     sp, x19
    mov     x0, #1
    RESTORE
    ret

mmu_on:
    adrp    x9, stage1_level0
    add     x9, x9, :lo12:stage1_level0
    msr     ttbr0_el1, x9
    mov     x9, #0x04ff             // attribute 0: Normal write-back, attribute 1: Device-nGnRE
    msr     mair_el1, x9
    mrs     x9, id_aa64mmfr0_el1
    and     x9, x9, #0xf
    mov     x10, #5                 // 48 bits at most
    cmp     x9, x10
    csel    x9, x9, x10, lo
    lsl     x9, x9, #32
    ldr     x10, =0x00803510        // T0SZ = 16, write-back, inner shareable, 4 KiB granule, no walks from TTBR1
    orr     x9, x9, x10
    msr     tcr_el1, x9
    adrp    x9, vectors
    add     x9, x9, :lo12:vectors
    msr     vbar_el1, x9
    mov     x9, #(3 << 20)          // FP and SIMD on
    msr     cpacr_el1, x9
    tlbi    vmalle1
    ic      iallu
    dsb     nsh
    isb
    ldr     x9, =0x30d01805         // RES1 bits, MMU, data and instruction caches
    msr     sctlr_el1, x9
    isb
    ret
    .ltorg

// ---------------------------------------------------------------------------------------------------------------------
// Stage 1: identity. The first gigabyte and everything from 256 GiB up is Device, the rest Normal. From bit 47 up the same
// again for EL0. Constant, so that no code runs before the MMU is on.

.macro BLOCKS first, count, attributes
    .set    .Lindex, \first
    .rept   \count
    .quad   (.Lindex << 30) | \attributes
    .set    .Lindex, .Lindex + 1
    .endr
.endm


.section .data.resume, "aw"
.balign 8
.global resume_context
resume_context:
    .quad   0

.section .data.tables, "aw"
.balign 4096
.global stage1_level0
stage1_level0:
    .quad   stage1_low + 3
    .quad   stage1_high + 3
    .fill   254, 8, 0
    .quad   stage1_low_el0 + 3
    .fill   255, 8, 0
stage1_low:
    BLOCKS  0, 1, 0x0060000000000405
    BLOCKS  1, 255, 0x0040000000000701
    BLOCKS  256, 256, 0x0060000000000405
stage1_high:
    BLOCKS  512, 512, 0x0060000000000405
stage1_low_el0:
    BLOCKS  0, 1, 0x0060000000000445
    BLOCKS  1, 255, 0x0020000000000741
    BLOCKS  256, 256, 0x0060000000000445

// ---------------------------------------------------------------------------------------------------------------------
// Vectors. An abort inside a probe continues in the probe with the syndrome in x1 to x4; everything else is a failure
// of the run.

.section .text.vectors, "ax"

.macro UNEXPECTED offset
    .balign 0x80
    mov     x0, #\offset
    b       unexpected
.endm

.balign 0x800
vectors:
    UNEXPECTED 0x000
    UNEXPECTED 0x080
    UNEXPECTED 0x100
    UNEXPECTED 0x180
    .balign 0x80                    // 0x200: synchronous, EL1h
    b       sync_el1
    UNEXPECTED 0x280
    UNEXPECTED 0x300
    UNEXPECTED 0x380
    .balign 0x80                    // 0x400: synchronous, EL0
    b       sync_el0
    UNEXPECTED 0x480
    UNEXPECTED 0x500
    UNEXPECTED 0x580
    UNEXPECTED 0x600
    UNEXPECTED 0x680
    UNEXPECTED 0x700
    UNEXPECTED 0x780

sync_el1:
    stp     x9, x10, [sp, #-32]!
    str     x11, [sp, #16]
    adr     x9, probe_start
    adr     x10, probe_end
    mrs     x11, elr_el1            // the probe itself aborted ...
    cmp     x11, x9
    ccmp    x11, x10, #2, hs
    b.lo    1f
    cmp     x30, x9                 // ... or what it branched to did
    ccmp    x30, x10, #2, hs
    b.lo    1f
    ldr     x11, [sp, #16]
    ldp     x9, x10, [sp], #32
    mov     x0, #0x200
    b       unexpected
1:  ldr     x11, [sp, #16]
    ldp     x9, x10, [sp], #32
    mrs     x1, esr_el1
    mrs     x2, far_el1
    mrs     x3, elr_el1
    mov     x4, #0x200
    msr     elr_el1, x30
    eret

sync_el0:
    mrs     x1, esr_el1
    mrs     x2, far_el1
    mrs     x3, elr_el1
    mov     x4, #0x400
    b       restore_and_return

unexpected:
    mrs     x1, esr_el1
    mrs     x2, elr_el1
    mrs     x3, far_el1
    bl      {unexpected_exception}
    b       .

// ---------------------------------------------------------------------------------------------------------------------
// Probes: one access each. Return x0 = value and x1 = 0, or x1 = ESR, x2 = FAR, x3 = ELR, x4 = vector offset.

probe_start:
.global probe_read
probe_read:
    mov     x1, xzr
    ldr     x0, [x0]
    ret
.global probe_read32
probe_read32:
    mov     x1, xzr
    ldr     w0, [x0]
    ret
.global probe_write
probe_write:
    mov     x9, x1
    mov     x1, xzr
    str     x9, [x0]
    ret
.global probe_atomic
probe_atomic:
    mov     x1, xzr
    mov     x9, x0
1:  ldxr    x0, [x9]
    stxr    w10, x0, [x9]
    cbnz    w10, 1b
    ret
.global probe_pair
probe_pair:                         // its syndrome names no register (ISV = 0)
    mov     x1, xzr
    ldp     x0, x9, [x0]
    ret
.global probe_zero
probe_zero:                         // writes a whole cache line; its syndrome has CM set
    mov     x1, xzr
    dc      zva, x0
    ret
.global probe_execute
probe_execute:
    stp     x29, x30, [sp, #-16]!
    mov     x1, xzr
    blr     x0
    ldp     x29, x30, [sp], #16
    ret
probe_end:

// Runs x0 at EL0 with x0 = x1 and x1 = x2 until its first exception; returns as the probes do.
.global el0_run
el0_run:
    SAVE
    msr     elr_el1, x0
    mov     x9, #0x3c0
    msr     spsr_el1, x9
    mov     x0, x1
    mov     x1, x2
    eret
restore_and_return:
    RESTORE
    ret

.global el0_read
el0_read:
    ldr     x0, [x0]
    svc     #0
.global el0_write
el0_write:
    str     x1, [x0]
    svc     #0
.global el0_execute
el0_execute:
    br      x0

// ---------------------------------------------------------------------------------------------------------------------
// Calls: x0 = address of 31 registers, which are loaded, and stored again after the instruction.

.macro CALL name, instruction, immediate
.global \name
\name:
    SAVE
    str     x0, [sp, #96]
    ldp     x2, x3, [x0, #16]
    ldp     x4, x5, [x0, #32]
    ldp     x6, x7, [x0, #48]
    ldp     x8, x9, [x0, #64]
    ldp     x10, x11, [x0, #80]
    ldp     x12, x13, [x0, #96]
    ldp     x14, x15, [x0, #112]
    ldp     x16, x17, [x0, #128]
    ldp     x18, x19, [x0, #144]
    ldp     x20, x21, [x0, #160]
    ldp     x22, x23, [x0, #176]
    ldp     x24, x25, [x0, #192]
    ldp     x26, x27, [x0, #208]
    ldp     x28, x29, [x0, #224]
    ldr     x30, [x0, #240]
    ldp     x0, x1, [x0]
    \instruction #\immediate
    stp     x0, x1, [sp, #-16]!
    ldr     x0, [sp, #112]
    stp     x2, x3, [x0, #16]
    stp     x4, x5, [x0, #32]
    stp     x6, x7, [x0, #48]
    stp     x8, x9, [x0, #64]
    stp     x10, x11, [x0, #80]
    stp     x12, x13, [x0, #96]
    stp     x14, x15, [x0, #112]
    stp     x16, x17, [x0, #128]
    stp     x18, x19, [x0, #144]
    stp     x20, x21, [x0, #160]
    stp     x22, x23, [x0, #176]
    stp     x24, x25, [x0, #192]
    stp     x26, x27, [x0, #208]
    stp     x28, x29, [x0, #224]
    str     x30, [x0, #240]
    ldp     x2, x3, [sp], #16
    stp     x2, x3, [x0]
    RESTORE
    ret
.endm

    CALL    call_hvc, hvc, 0
    CALL    call_hvc_1, hvc, 1
    CALL    call_hvc_ffff, hvc, 0xffff
    CALL    call_smc, smc, 0
    CALL    call_smc_1, smc, 1
    CALL    call_smc_ffff, smc, 0xffff

// The same with the SIMD registers: x0 = 31 registers of which x0 to x3 are used, x1 = 32 vectors, x2 = 0 HVC, 1 SMC.
.macro VECTORS operation, base
    \operation q0, q1, [\base]
    \operation q2, q3, [\base, #32]
    \operation q4, q5, [\base, #64]
    \operation q6, q7, [\base, #96]
    \operation q8, q9, [\base, #128]
    \operation q10, q11, [\base, #160]
    \operation q12, q13, [\base, #192]
    \operation q14, q15, [\base, #224]
    \operation q16, q17, [\base, #256]
    \operation q18, q19, [\base, #288]
    \operation q20, q21, [\base, #320]
    \operation q22, q23, [\base, #352]
    \operation q24, q25, [\base, #384]
    \operation q26, q27, [\base, #416]
    \operation q28, q29, [\base, #448]
    \operation q30, q31, [\base, #480]
.endm

.global call_with_vectors
call_with_vectors:
    stp     x0, x1, [sp, #-32]!
    str     x30, [sp, #16]
    VECTORS ldp, x1
    mov     x9, x2
    ldp     x2, x3, [x0, #16]
    ldp     x0, x1, [x0]
    cbnz    x9, 1f
    hvc     #0
    b       2f
1:  smc     #0
2:  ldp     x9, x10, [sp]
    stp     x0, x1, [x9]
    stp     x2, x3, [x9, #16]
    VECTORS stp, x10
    ldr     x30, [sp, #16]
    add     sp, sp, #32
    ret
