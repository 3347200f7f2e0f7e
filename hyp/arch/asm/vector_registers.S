// FP, SIMD and SVE registers, to and from memory.
//
// The only code at EL2 that touches them: between `vector_code_start` and `vector_code_end`, where the gate over the image's
// instructions lets it. x0 = where, a multiple of 16: FPSR, FPCR, ZCR_EL1, 8 bytes to spare, and then the registers.

.arch_extension fp
.arch_extension simd
.arch_extension sve

.section .text.vector_registers, "ax"
.global vector_code_start
vector_code_start:

// Q0 to Q31.
.global simd_save
simd_save:
    hint    #34                         // bti c
    mrs     x1, fpsr
    mrs     x2, fpcr
    stp     x1, x2, [x0]
    stp     q0, q1, [x0, #32]
    stp     q2, q3, [x0, #64]
    stp     q4, q5, [x0, #96]
    stp     q6, q7, [x0, #128]
    stp     q8, q9, [x0, #160]
    stp     q10, q11, [x0, #192]
    stp     q12, q13, [x0, #224]
    stp     q14, q15, [x0, #256]
    stp     q16, q17, [x0, #288]
    stp     q18, q19, [x0, #320]
    stp     q20, q21, [x0, #352]
    stp     q22, q23, [x0, #384]
    stp     q24, q25, [x0, #416]
    stp     q26, q27, [x0, #448]
    stp     q28, q29, [x0, #480]
    stp     q30, q31, [x0, #512]
    ret

.global simd_load
simd_load:
    hint    #34                         // bti c
    ldp     x1, x2, [x0]
    msr     fpsr, x1
    msr     fpcr, x2
    ldp     q0, q1, [x0, #32]
    ldp     q2, q3, [x0, #64]
    ldp     q4, q5, [x0, #96]
    ldp     q6, q7, [x0, #128]
    ldp     q8, q9, [x0, #160]
    ldp     q10, q11, [x0, #192]
    ldp     q12, q13, [x0, #224]
    ldp     q14, q15, [x0, #256]
    ldp     q16, q17, [x0, #288]
    ldp     q18, q19, [x0, #320]
    ldp     q20, q21, [x0, #352]
    ldp     q22, q23, [x0, #384]
    ldp     q24, q25, [x0, #416]
    ldp     q26, q27, [x0, #448]
    ldp     q28, q29, [x0, #480]
    ldp     q30, q31, [x0, #512]
    ret

// Z0 to Z31, P0 to P15 and FFR, with the vector length of EL2, which is the longest.
.global sve_save
sve_save:
    hint    #34                         // bti c
    mrs     x1, fpsr
    mrs     x2, fpcr
    mrs     x3, s3_0_c1_c2_0            // zcr_el1
    stp     x1, x2, [x0]
    str     x3, [x0, #16]
    add     x0, x0, #32
    str     z0, [x0, #0, mul vl]
    str     z1, [x0, #1, mul vl]
    str     z2, [x0, #2, mul vl]
    str     z3, [x0, #3, mul vl]
    str     z4, [x0, #4, mul vl]
    str     z5, [x0, #5, mul vl]
    str     z6, [x0, #6, mul vl]
    str     z7, [x0, #7, mul vl]
    str     z8, [x0, #8, mul vl]
    str     z9, [x0, #9, mul vl]
    str     z10, [x0, #10, mul vl]
    str     z11, [x0, #11, mul vl]
    str     z12, [x0, #12, mul vl]
    str     z13, [x0, #13, mul vl]
    str     z14, [x0, #14, mul vl]
    str     z15, [x0, #15, mul vl]
    str     z16, [x0, #16, mul vl]
    str     z17, [x0, #17, mul vl]
    str     z18, [x0, #18, mul vl]
    str     z19, [x0, #19, mul vl]
    str     z20, [x0, #20, mul vl]
    str     z21, [x0, #21, mul vl]
    str     z22, [x0, #22, mul vl]
    str     z23, [x0, #23, mul vl]
    str     z24, [x0, #24, mul vl]
    str     z25, [x0, #25, mul vl]
    str     z26, [x0, #26, mul vl]
    str     z27, [x0, #27, mul vl]
    str     z28, [x0, #28, mul vl]
    str     z29, [x0, #29, mul vl]
    str     z30, [x0, #30, mul vl]
    str     z31, [x0, #31, mul vl]
    addvl   x0, x0, #16                 // 32 registers
    addvl   x0, x0, #16
    str     p0, [x0, #0, mul vl]
    str     p1, [x0, #1, mul vl]
    str     p2, [x0, #2, mul vl]
    str     p3, [x0, #3, mul vl]
    str     p4, [x0, #4, mul vl]
    str     p5, [x0, #5, mul vl]
    str     p6, [x0, #6, mul vl]
    str     p7, [x0, #7, mul vl]
    str     p8, [x0, #8, mul vl]
    str     p9, [x0, #9, mul vl]
    str     p10, [x0, #10, mul vl]
    str     p11, [x0, #11, mul vl]
    str     p12, [x0, #12, mul vl]
    str     p13, [x0, #13, mul vl]
    str     p14, [x0, #14, mul vl]
    str     p15, [x0, #15, mul vl]
    rdffr   p0.b                        // behind P15; P0 has been saved
    str     p0, [x0, #16, mul vl]
    ret

.global sve_load
sve_load:
    hint    #34                         // bti c
    ldp     x1, x2, [x0]
    ldr     x3, [x0, #16]
    msr     fpsr, x1
    msr     fpcr, x2
    msr     s3_0_c1_c2_0, x3            // zcr_el1: no part in the length at EL2
    add     x0, x0, #32
    ldr     z0, [x0, #0, mul vl]
    ldr     z1, [x0, #1, mul vl]
    ldr     z2, [x0, #2, mul vl]
    ldr     z3, [x0, #3, mul vl]
    ldr     z4, [x0, #4, mul vl]
    ldr     z5, [x0, #5, mul vl]
    ldr     z6, [x0, #6, mul vl]
    ldr     z7, [x0, #7, mul vl]
    ldr     z8, [x0, #8, mul vl]
    ldr     z9, [x0, #9, mul vl]
    ldr     z10, [x0, #10, mul vl]
    ldr     z11, [x0, #11, mul vl]
    ldr     z12, [x0, #12, mul vl]
    ldr     z13, [x0, #13, mul vl]
    ldr     z14, [x0, #14, mul vl]
    ldr     z15, [x0, #15, mul vl]
    ldr     z16, [x0, #16, mul vl]
    ldr     z17, [x0, #17, mul vl]
    ldr     z18, [x0, #18, mul vl]
    ldr     z19, [x0, #19, mul vl]
    ldr     z20, [x0, #20, mul vl]
    ldr     z21, [x0, #21, mul vl]
    ldr     z22, [x0, #22, mul vl]
    ldr     z23, [x0, #23, mul vl]
    ldr     z24, [x0, #24, mul vl]
    ldr     z25, [x0, #25, mul vl]
    ldr     z26, [x0, #26, mul vl]
    ldr     z27, [x0, #27, mul vl]
    ldr     z28, [x0, #28, mul vl]
    ldr     z29, [x0, #29, mul vl]
    ldr     z30, [x0, #30, mul vl]
    ldr     z31, [x0, #31, mul vl]
    addvl   x0, x0, #16                 // 32 registers
    addvl   x0, x0, #16
    ldr     p0, [x0, #16, mul vl]
    wrffr   p0.b
    ldr     p0, [x0, #0, mul vl]
    ldr     p1, [x0, #1, mul vl]
    ldr     p2, [x0, #2, mul vl]
    ldr     p3, [x0, #3, mul vl]
    ldr     p4, [x0, #4, mul vl]
    ldr     p5, [x0, #5, mul vl]
    ldr     p6, [x0, #6, mul vl]
    ldr     p7, [x0, #7, mul vl]
    ldr     p8, [x0, #8, mul vl]
    ldr     p9, [x0, #9, mul vl]
    ldr     p10, [x0, #10, mul vl]
    ldr     p11, [x0, #11, mul vl]
    ldr     p12, [x0, #12, mul vl]
    ldr     p13, [x0, #13, mul vl]
    ldr     p14, [x0, #14, mul vl]
    ldr     p15, [x0, #15, mul vl]
    ret

// Returns the vector length of EL2 in bytes.
.global sve_length
sve_length:
    hint    #34                         // bti c
    rdvl    x0, #1
    ret

.global vector_code_end
vector_code_end:
