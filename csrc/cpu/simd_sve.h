/* simd_sve.h: what simd.h needs of SVE with vectors of 256 bits: a vector of 16 lanes is 2 registers. A build says that they have this length
 * (-msve-vector-bits=256), so clang makes SVE of the vector operators too. */
#ifndef PE_SIMD_SVE_H
#define PE_SIMD_SVE_H

#include <arm_neon_sve_bridge.h>
#include <arm_sve.h>

typedef svfloat32_t sv_f __attribute__((arm_sve_vector_bits(256)));
typedef svint32_t sv_i __attribute__((arm_sve_vector_bits(256)));
typedef svuint8_t sv_b __attribute__((arm_sve_vector_bits(256)));
typedef svint8_t sv_s __attribute__((arm_sve_vector_bits(256)));
#define SV_ALL svptrue_b32()

#define PE_DOT_ZERO 128
PE_INLINE pe_pf p_fma(pe_pf a, pe_pf b, pe_pf c) { return (pe_pf)(sv_f)svmla_f32_x(SV_ALL, (sv_f)c, (sv_f)a, (sv_f)b); }
PE_INLINE pe_pf p_select_lt(pe_pf a, pe_pf b, pe_pf x, pe_pf y) {
  return (pe_pf)(sv_f)svsel_f32(svcmplt_f32(SV_ALL, (sv_f)a, (sv_f)b), (sv_f)x, (sv_f)y);
}
PE_INLINE pe_pf p_min(pe_pf a, pe_pf b) { return p_select_lt(a, b, a, b); }
PE_INLINE pe_pf p_max(pe_pf a, pe_pf b) { return p_select_lt(b, a, a, b); }
PE_INLINE pe_pf p_sqrt(pe_pf a) { return (pe_pf)(sv_f)svsqrt_f32_x(SV_ALL, (sv_f)a); }
PE_INLINE pe_pi p_round(pe_pf a) { return (pe_pi)(sv_i)svcvt_s32_f32_x(SV_ALL, svrintn_f32_x(SV_ALL, (sv_f)a)); }
PE_INLINE pe_pf p_to_f(pe_pi a) { return (pe_pf)(sv_f)svcvt_f32_s32_x(SV_ALL, (sv_i)a); }
PE_INLINE pe_pi p_maxi(pe_pi a, pe_pi b) { return (pe_pi)(sv_i)svmax_s32_x(SV_ALL, (sv_i)a, (sv_i)b); }
PE_INLINE pe_pf p_f16(const void *p) {
  return (pe_pf)(sv_f)svcvt_f32_f16_x(SV_ALL, svreinterpret_f16_u32(svld1uh_u32(SV_ALL, (const uint16_t *)p)));
}
PE_INLINE void p_to_f16(void *p, pe_pf v) {
  svst1h_u32(SV_ALL, (uint16_t *)p, svreinterpret_u32_f16(svcvt_f16_f32_x(SV_ALL, (sv_f)v)));
}
PE_INLINE pe_pi p_u16(const void *p) { return (pe_pi)(sv_i)svld1uh_s32(SV_ALL, (const uint16_t *)p); }
PE_INLINE pe_pi p_i8(const void *p) { return (pe_pi)(sv_i)svld1sb_s32(SV_ALL, (const int8_t *)p); }
PE_INLINE void p_to_u16(void *p, pe_pi v) { svst1h_s32(SV_ALL, (int16_t *)p, (sv_i)v); }
PE_INLINE void p_to_i8(void *p, pe_pi v) {
  svst1b_s32(SV_ALL, (int8_t *)p, svmax_n_s32_x(SV_ALL, svmin_n_s32_x(SV_ALL, (sv_i)v, 127), -128));
}
PE_INLINE pe_pb p_table(const uint8_t t[16], pe_pb i) { return (pe_pb)(sv_b)svtbl_u8(svld1rq_u8(svptrue_b8(), t), (sv_b)i); }
PE_INLINE pe_pi p_dot_u7(pe_pi acc, pe_pb w, pe_pb x) { return (pe_pi)(sv_i)svdot_s32((sv_i)acc, (sv_s)w, (sv_s)x); }
PE_INLINE pe_pi p_dot_z128(pe_pi acc, pe_pb w, pe_pb x) { return p_dot_u7(acc, w ^ (uint8_t)0x80, x); }

PE_INLINE v16f v16f_set1(float x) { const pe_pf v = (pe_pf)(sv_f)svdup_n_f32(x); return (v16f){v, v}; }
PE_INLINE v16i v16i_set1(int32_t x) { const pe_pi v = (pe_pi)(sv_i)svdup_n_s32(x); return (v16i){v, v}; }
PE_INLINE v64u v64u_set1(uint8_t x) { const pe_pb v = (pe_pb)(sv_b)svdup_n_u8(x); return (v64u){v, v}; }

/* Lanes i and i + 4 of 8. */
#define SV_LOW(v) __builtin_shufflevector(v, v, 0, 1, 2, 3)
#define SV_HIGH(v) __builtin_shufflevector(v, v, 4, 5, 6, 7)

#endif
