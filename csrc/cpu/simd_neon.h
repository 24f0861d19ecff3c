/* simd_neon.h: what simd.h needs of NEON: a vector of 16 lanes is 4 registers. */
#ifndef PE_SIMD_NEON_H
#define PE_SIMD_NEON_H

#define PE_DOT_ZERO 128
PE_INLINE pe_pf p_fma(pe_pf a, pe_pf b, pe_pf c) {
  return (pe_pf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
PE_INLINE pe_pf p_select_lt(pe_pf a, pe_pf b, pe_pf x, pe_pf y) {
  return (pe_pf)vbslq_f32(vcltq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)x, (float32x4_t)y);
}
PE_INLINE pe_pf p_min(pe_pf a, pe_pf b) { return p_select_lt(a, b, a, b); }
PE_INLINE pe_pf p_max(pe_pf a, pe_pf b) { return p_select_lt(b, a, a, b); }
PE_INLINE pe_pf p_sqrt(pe_pf a) { return (pe_pf)vsqrtq_f32((float32x4_t)a); }
PE_INLINE pe_pi p_round(pe_pf a) { return (pe_pi)vcvtnq_s32_f32((float32x4_t)a); }
PE_INLINE pe_pf p_to_f(pe_pi a) { return (pe_pf)vcvtq_f32_s32((int32x4_t)a); }
PE_INLINE pe_pi p_maxi(pe_pi a, pe_pi b) { return (pe_pi)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }
PE_INLINE pe_pf p_f16(const void *p) {
  return (pe_pf)vcvt_f32_f16(vreinterpret_f16_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *)p))));
}
PE_INLINE void p_to_f16(void *p, pe_pf v) {
  vst1_u8((uint8_t *)p, vreinterpret_u8_f16(vcvt_f16_f32((float32x4_t)v)));
}
PE_INLINE pe_pi p_u16(const void *p) { return (pe_pi)vmovl_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t *)p))); }
PE_INLINE pe_pi p_i8(const void *p) {
  int32_t w;
  memcpy(&w, p, 4);
  return (pe_pi)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(w)))));
}
PE_INLINE void p_to_u16(void *p, pe_pi v) { vst1_u8((uint8_t *)p, vreinterpret_u8_s16(vmovn_s32((int32x4_t)v))); }
PE_INLINE void p_to_i8(void *p, pe_pi v) {
  int16x4_t h = vqmovn_s32((int32x4_t)v);
  int32_t w = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(h, h))), 0);
  memcpy(p, &w, 4);
}
PE_INLINE pe_pb p_table(const uint8_t t[16], pe_pb i) { return (pe_pb)vqtbl1q_u8(vld1q_u8(t), (uint8x16_t)i); }
PE_INLINE pe_pi p_dot_u7(pe_pi acc, pe_pb w, pe_pb x) {
  return (pe_pi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x);
}
PE_INLINE pe_pi p_dot_z128(pe_pi acc, pe_pb w, pe_pb x) { return p_dot_u7(acc, w ^ (uint8_t)0x80, x); }
PE_INLINE pe_pb p_insert(pe_pb a, pe_pb b, uint8_t mask) { return (pe_pb)vbslq_u8(vdupq_n_u8(mask), (uint8x16_t)b, (uint8x16_t)a); }
PE_INLINE pe_pb p_high_nibbles(pe_pb a) { return (pe_pb)vshrq_n_u8((uint8x16_t)a, 4); }

#endif
