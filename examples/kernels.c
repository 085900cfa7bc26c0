// Kernels for the CPU: kernels.py puts #defines before this and hands it to tinygrad, which compiles it, runs `kernel`
// once for each core_id and captures it in its JITs like a kernel of its own. One of these is defined:
//
//   MATMUL: out (I, J) = x (I, K) @ b (K, J), BATCH times. A_T, B_T: x, b stored transposed, as a weight is in its file
//     (B_T). BITS: of a number of b: 32 and 16 are floats (FLOAT16, else bfloat16), 8 and 4 integers with a scale for a
//     row of b or for 32 of its numbers. ROUNDED: x may be rounded to bfloat16. FEW: up to so many rows of x b is read
//     in place.
//   ROWS: out (I, K) = rows ids (I,) of b.
//   SOFTMAX, SOFT_CAP, GELU, NORM: of each row of x (I, K): softmax(x * SCALE); CAP * tanh(x * SCALE / CAP); gelu(x), and
//     times b (I, K) if GELU is 2; RMSNorm with weights b if NORM is 2, LayerNorm with b and bias if it is 3.
//   ATTEND: out (I, K) = softmax(x keys^T * SCALE, with CAP if not 0) values: QUERIES rows of x for each head of b, the
//     keys, and of values, both (SLOTS, K); HEADS of them share a row of seen (SLOTS).
//
// The product:
//
// A panel of b, PC lanes of K x 2 vectors of J, is packed where the first-level cache holds it, and serves all tiles of
// MR rows of x. A tile's sums are vectors along J: nothing is added across lanes. Weights are transposed while they are
// packed, a few percent of the work at 264 rows, so they stay as the file has them. A lane is one float or, with
// AVX512-BF16 and at twice the speed, two neighbours along K rounded to bfloat16.
#define INLINE static inline __attribute__((always_inline, no_builtin))  // no_builtin: there is no memcpy to link to
#define UNROLL _Pragma("clang loop unroll(full)")
#define MIN(x, y) ((x) < (y) ? (x) : (y))
#if defined(__AVX512F__)  // 32 registers of 16 floats
#define W 16
#define MR 12
#define LO 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23  // interleaves the lower halves of two vectors
#define HI 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)  // 16 registers of 8
#define W 8
#define MR 6
#define LO 0, 8, 1, 9, 2, 10, 3, 11
#define HI 4, 12, 5, 13, 6, 14, 7, 15
#else  // NEON: 32 registers of 4
#define W 4
#define MR 12
#define LO 0, 4, 1, 5
#define HI 2, 6, 3, 7
#endif
// aligned(1): views of a file start anywhere
#define VECTOR(type) __attribute__((vector_size(W * sizeof(type)), aligned(1)))
typedef float vec VECTOR(float);
typedef int ints VECTOR(int);
typedef unsigned char bytes VECTOR(char);
typedef signed char chars VECTOR(char);
typedef unsigned short shorts VECTOR(short);
typedef __fp16 halves VECTOR(short);
#if ROUNDED && defined(__AVX512BF16__)
#define L 2  // values of K in a lane
typedef int lane;
#if __clang_major__ < 16
typedef int pairs VECTOR(int);
#else
typedef __bf16 pairs VECTOR(int);
#endif
#define MULADD(s, x, y) (vec)__builtin_ia32_dpbf16ps_512(s, (pairs)(x), (pairs)(y))
#define ROUND(x, y) (vec)__builtin_ia32_cvtne2ps2bf16_512(y, x)
#define P ((K + 31) / 32 * 16)  // lanes in a row of a
#define A_I (P + 16)  // stride of the rows: 4096 bytes apart they would share one set of the cache
#define A_P 1
#define SPLAT(x) ((x) - (ints){0})
#else
#define L 1
typedef float lane;
#define MULADD(s, x, y) ((s) + (x) * (y))
#define P K
#define A_I (A_T ? 1 : K)
#define A_P (A_T ? I : 1)
#define SPLAT(x) (x)
#endif
#define V (W * L)  // values of K in a vector
#define NR (2 * W)
#define PC 256
#define MB (40 * MR)  // rows whose PC lanes stay in the second-level cache: of 4096 rows all would not
#define GROUPS ((K + 31) / 32)

// points to V values of a row from k on; the row's last ones are copied and padded with zeros
INLINE const char *at(const void *row, long k, int size, char *copy) {
  const char *p = (const char *)row + k * size;
  if (K % V == 0 || k + V <= K) return p;
  for (int i = 0; i < V * size; i++) copy[i] = i < (K - k) * size ? p[i] : 0;
  return copy;
}
INLINE vec floats(const char *p, long k, float s) {
#if BITS == 32
  return *(vec *)(p + 4 * k);
#elif BITS == 16 && FLOAT16
  return __builtin_convertvector(*(halves *)(p + 2 * k), vec);
#elif BITS == 16
  return (vec)(__builtin_convertvector(*(shorts *)(p + 2 * k), ints) << 16);
#elif BITS == 8
  return __builtin_convertvector(*(chars *)(p + k), vec);
#elif BITS == 4  // a byte holds two neighbours, the first in its lower half, plus 8
  bytes v = *(bytes *)(p + k / NR * W);
  v = k % NR < W ? __builtin_shufflevector(v, v, LO) : __builtin_shufflevector(v, v, HI);
  ints shift = __builtin_shufflevector((ints){0}, (ints){0} + 4, LO);
  return (__builtin_convertvector(__builtin_convertvector(v, ints) >> shift & 15, vec) - 8) * s;
#endif
}
// V values of row j of b from k on, as W lanes
INLINE vec load(const char *b, const float *scale, long j, long k) {
  char copy[V * 4];
#if BITS == 4
  const float s = scale[j * GROUPS + k / 32];
  const char *p = b + (j * GROUPS + k / 32) * 16;
  k %= 32;
#else
  const float s = 1;
  const char *p = at(b + j * K * (BITS / 8), k, BITS / 8, copy);
  if (I <= FEW) __builtin_prefetch(p + 6144);  // one core reads 38 GB/s instead of 32
  k = 0;
#endif
#if L == 2 && BITS == 16
  return *(vec *)p;
#elif L == 2
  return ROUND(floats(p, k, s), floats(p, k + W, s));
#else
  return floats(p, k, s);
#endif
}
INLINE void transpose(vec *v) {  // each round rotates the bits of (row, lane) by one
  UNROLL for (int n = 1; n < W; n *= 2) {
    vec t[W];
    UNROLL for (int i = 0; i < W; i++) t[i] = v[i];
    UNROLL for (int i = 0; i < W / 2; i++) {
      v[2 * i] = __builtin_shufflevector(t[i], t[i + W / 2], LO);
      v[2 * i + 1] = __builtin_shufflevector(t[i], t[i + W / 2], HI);
    }
  }
}
INLINE void store(float *o, vec v, int n, int add, const float *scale) {
  if (n >= W) {
    if (add) v += *(vec *)o;
    *(vec *)o = scale ? v * *(vec *)scale : v;
  } else for (int j = 0; j < n; j++) o[j] = (add ? o[j] + v[j] : v[j]) * (scale ? scale[j] : 1);
}
#if !MATMUL && !ROWS
#ifndef SCALE
#define SCALE 1
#endif
#ifndef CAP
#define CAP 0
#endif
// tinygrad's own exponential takes 1.5 ns a number on two cores, a softmax with this 0.25
#define SELECT(yes, a, b) (vec)(((yes) & (ints)((vec){0} + (a))) | (~(yes) & (ints)((vec){0} + (b))))
INLINE vec exponential(vec x) {
  x = SELECT(x < -87, -87.f, SELECT(x > 88, 88.f, x));  // comparisons that let NaN through
  vec n = x * 1.44269504f;
  const ints whole = __builtin_convertvector(n + SELECT(n < 0, -.5f, .5f), ints);
  n = __builtin_convertvector(whole, vec);
  x = x - n * .693359375f + n * 2.12194440e-4f;  // log(2) in two parts: the first product is exact
  const vec p = 1 / 6.f + x * (1 / 24.f + x * (1 / 120.f + x * (1 / 720.f + x / 5040)));
  return (1 + x * (1 + x * (1 / 2.f + x * p))) * (vec)((whole + 127) << 23);
}
INLINE vec capped(vec x) {
  x *= (float)SCALE;
  const float cap = CAP;
  return cap > 0 ? cap - 2 * cap / (1 + exponential(x * (2 / cap))) : x;  // by tanh
}
INLINE float total(vec v) {
  float sum = 0;
  UNROLL for (int r = 0; r < W; r++) sum += v[r];
  return sum;
}
#endif
#if ATTEND
#define BLOCK 32  // slots at a time; what was summed is scaled down when a larger logit turns up
#define U (K % (4 * W) ? 1 : 4)
INLINE vec row(const float *p, int slot, int k) {
  char copy[4 * W];
  return *(vec *)at(p + (long)slot * K, k, 4, copy);
}
__attribute__((no_builtin)) void kernel(float *restrict out, ARGS const int core_id) {
  const int end = (long)I * (core_id + 1) / CORES;
  for (int i = (long)I * core_id / CORES, n; i < end; i += n) {  // the n queries of one head that this core has
    const int head = i / QUERIES;
    n = MIN(end, (head + 1) * QUERIES) - i;
    const float *keys = (const float *)b + (long)head * SLOTS * K, *vs = values + (long)head * SLOTS * K;
    const char *mask = seen + (long)head / HEADS * SLOTS;
    float top[QUERIES], sums[QUERIES], p[QUERIES][BLOCK];
    for (int q = 0; q < n; q++) top[q] = -1e30f, sums[q] = 0;
    for (int k = 0; k < n * K; k++) out[(long)i * K + k] = 0;
    for (int c = 0; c < SLOTS; c += BLOCK) {
      int yes[BLOCK], any = 0;
      for (int s = 0; s < BLOCK; s++) any |= yes[s] = c + s < SLOTS && mask[c + s];
      if (!any) continue;
      for (int s = 0; s < BLOCK; s += W) for (int q = 0; q < n; q++) {
        vec logits[W] = {{0}};
        for (int r = 0; r < W; r++) if (yes[s + r]) {
          vec sum[U] = {{0}};
          for (int k = 0; k < K; k += U * W)
            UNROLL for (int u = 0; u < U; u++) sum[u] += row(x, i + q, k + u * W) * row(keys, c + s + r, k + u * W);
          UNROLL for (int u = 0; u < U; u++) logits[r] += sum[u];
        }
        transpose(logits);
        UNROLL for (int r = 1; r < W; r++) logits[0] += logits[r];
        *(vec *)(p[q] + s) = capped(logits[0]);
      }
      for (int q = 0; q < n; q++) {
        float most = top[q];
        vec sum = {0};
        for (int s = 0; s < BLOCK; s++) {
          if (!yes[s]) p[q][s] = -1e30f;
          most = p[q][s] > most ? p[q][s] : most;
        }
        for (int s = 0; s < BLOCK; s += W) sum += *(vec *)(p[q] + s) = exponential(*(vec *)(p[q] + s) - most);
        const float keep = exponential((vec){0} + (top[q] - most))[0];
        sums[q] = sums[q] * keep + total(sum);
        top[q] = most;
        for (int k = 0; k < K; k += U * W) {
          vec o[U];
          UNROLL for (int u = 0; u < U; u++) o[u] = row(out, i + q, k + u * W) * keep;
          for (int s = 0; s < MIN(BLOCK, SLOTS - c); s++)
            UNROLL for (int u = 0; u < U; u++) o[u] += row(vs, c + s, k + u * W) * p[q][s];
          UNROLL for (int u = 0; u < U; u++) store(out + (i + q) * (long)K + k + u * W, o[u], K - k - u * W, 0, 0);
        }
      }
    }
    for (int q = 0; q < n; q++) for (int k = 0; k < K; k++) out[(i + q) * (long)K + k] /= sums[q];
  }
}
#elif !MATMUL && !ROWS
INLINE vec part(const float *x, long n) {  // the last ones of a row are followed by -inf
  if (n >= W) return *(vec *)x;
  float copy[W];
  for (int i = 0; i < W; i++) copy[i] = i < n ? x[i] : -__builtin_inff();
  return *(vec *)copy;
}
__attribute__((no_builtin)) void kernel(float *restrict out, ARGS const int core_id) {
  for (long i = (long)I * core_id / CORES; i < (long)I * (core_id + 1) / CORES; i++) {
    const float *row = x + i * K;
    float *o = out + i * K;
#if SOFTMAX
    vec most = (vec){0} - __builtin_inff(), sum = {0};
    float top = most[0];
    for (int k = 0; k < K; k += W) { vec v = part(row + k, K - k); most = SELECT(v > most, v, most); }
    for (int r = 0; r < W; r++) top = most[r] > top ? most[r] : top;
    for (int k = 0; k < K; k += W) {
      vec v = exponential(capped(part(row + k, K - k) - top));
      store(o + k, v, K - k, 0, 0);
      sum += v;  // what follows the last ones is 1e-38
    }
    const float all = total(sum);
    for (int k = 0; k < K; k += W) store(o + k, part(o + k, K - k) / all, K - k, 0, 0);
#elif NORM
    char copy[4 * W];
    vec sum = {0}, squares = {0};
    for (int k = 0; k < K; k += W) sum += *(vec *)at(row, k, 4, copy);
    const float mean = NORM == 3 ? total(sum) / K : 0;
    for (int k = 0; k < K; k += W) {
      vec v = *(vec *)at(row, k, 4, copy) - mean;
      for (int r = K - k; r < W; r++) v[r] = 0;
      squares += v * v;
    }
    const float scale = 1 / __builtin_sqrtf(total(squares) / K + (float)EPS);
    for (int k = 0; k < K; k += W) {
      vec y = (*(vec *)at(row, k, 4, copy) - mean) * scale;
#if NORM == 3
      y = y * load(b, 0, 0, k) + load(bias, 0, 0, k);
#else
      y *= 1 + load(b, 0, 0, k);
#endif
      store(o + k, y, K - k, 0, 0);
    }
#else
    for (int k = 0; k < K; k += W) {
      const vec v = part(row + k, K - k);
#if SOFT_CAP
      vec y = capped(v);
#else
      const vec z = v * (1.59576912f + .0713548163f * v * v);  // 2 sqrt(2 / pi) (v + .044715 v^3)
      vec y = v / (1 + exponential(-z));
#if GELU == 2
      y *= part((const float *)b + i * K + k, K - k);
#endif
#endif
      store(o + k, y, K - k, 0, 0);
    }
#endif
  }
}
#else
INLINE void tile(const int rows, const int cols, float *o, const lane *a, const vec *panel, int pn, int jn, int add,
                 const float *scale) {
  vec s[MR][2];
  UNROLL for (int r = 0; r < rows; r++) s[r][0] = s[r][1] = (vec){0};
  for (int p = 0; p < pn; p++) {
    vec b0 = panel[2 * p], b1 = panel[2 * p + 1];
    UNROLL for (int r = 0; r < rows; r++) {
      lane x = a[r * (long)A_I + p * (long)A_P];
      s[r][0] = MULADD(s[r][0], SPLAT(x), b0);
      if (cols > W) s[r][1] = MULADD(s[r][1], SPLAT(x), b1);
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    store(o + r * (long)J, s[r][0], jn, add, scale);
    if (cols > W) store(o + r * (long)J + W, s[r][1], jn - W, add, scale ? scale + W : 0);
  }
}
#if L == 2 && BITS == 4  // scale after the product: 6 instructions for 32 weights, so that memory is the limit again
typedef short table __attribute__((vector_size(64)));
#define BF16(a, b, c, d) (short)a, (short)b, (short)c, (short)d
#define EIGHTS BF16(0xc100, 0xc0e0, 0xc0c0, 0xc0a0), BF16(0xc080, 0xc040, 0xc000, 0xbf80), \
  BF16(0, 0x3f80, 0x4000, 0x4040), BF16(0x4080, 0x40a0, 0x40c0, 0x40e0)  // -8 to 7
INLINE vec dot_step(vec s, vec x, const char *b, const float *scale, long j, long k) {
  const long g = j * GROUPS + k / 32;
  ints v = __builtin_convertvector(*(bytes *)(b + g * 16), ints);
  __builtin_prefetch(b + g * 16 + 6144);
  return s + MULADD((vec){0}, x, __builtin_ia32_permvarhi512((table){EIGHTS, EIGHTS}, (table)(v | v << 12))) * scale[g];
}
#else
#define dot_step(s, x, b, scale, j, k) MULADD(s, x, load(b, scale, j, k))
#endif
// the products of row x with row j of b, in W parts
INLINE vec dot(const lane *x, const char *b, const float *scale, long j) {
  vec s[8] = {{0}};
  char copy[V * 4];
  long k = 0;
  for (; k + 8 * V <= K; k += 8 * V)
    UNROLL for (int u = 0; u < 8; u++) s[u] = dot_step(s[u], *(vec *)(x + k / L + u * W), b, scale, j, k + u * V);
  for (; k < K; k += V)
    s[0] = dot_step(s[0], *(vec *)(L == 2 ? (const char *)(x + k / L) : at(x, k, 4, copy)), b, scale, j, k);
  return s[0] + s[1] + s[2] + s[3] + (s[4] + s[5] + s[6] + s[7]);
}
#if ROWS
__attribute__((no_builtin)) void kernel(float *restrict out, ARGS const int core_id) {
#if BITS > 8
  const float *scale = 0;
#endif
  for (int i = 0; i < I; i++) for (int k = 0; k < K; k += W)
    store(out + i * (long)K + k, load(b, scale, ids[i], k) * (BITS == 8 ? scale[ids[i]] : 1), K - k, 0, 0);
}
#else
__attribute__((no_builtin)) void kernel(float *restrict out, ARGS const int core_id) {
#if BITS > 8
  const float *scale = 0;
#endif
  // each core takes a share of the batch, or else of the columns or of the rows, whichever are more
  const int split = BATCH > 1 ? 0 : J >= I || I <= FEW ? 1 : 2, n = split == 0 ? BATCH : split == 1 ? J : I;
  const int unit = split == 0 ? 1 : split == 1 ? NR : MR, units = (n + unit - 1) / unit;
  const int lo = (long)units * core_id / CORES * unit, hi = MIN(n, (long)units * (core_id + 1) / CORES * unit);
  const int z0 = split == 0 ? lo : 0, z1 = split == 0 ? hi : 1, j0 = split == 1 ? lo : 0, j1 = split == 1 ? hi : J;
  const int i0 = split == 2 ? lo : 0, i1 = split == 2 ? hi : I;
#if L == 2  // every core rounds for itself: cheaper than another launch or a barrier
  lane *a = scratch + (long)core_id * I * A_I;
  for (int i = i0; i < i1; i++) for (int k = 0; k < K; k += V) {
    char copy[V * 4];
    const char *p = at(x + i * (long)K, k, 4, copy);
    *(vec *)(a + i * (long)A_I + k / L) = ROUND(*(vec *)p, *(vec *)(p + 4 * W));
  }
#else
  const lane *a = x;
#endif
#if I <= FEW  // memory is the limit: read b once, in order
  for (int j = j0; j < j1; j += W) for (int i = 0; i < I; i++) {
    vec s[W];
    for (int r = 0; r < W; r++) s[r] = dot(a + i * (long)A_I, b, scale, MIN(j + r, J - 1));
    transpose(s);
    UNROLL for (int r = 1; r < W; r++) s[0] += s[r];
    store(out + i * (long)J + j, s[0], J - j, 0, BITS == 8 ? scale + j : 0);
  }
#else
  vec panel[2 * PC] __attribute__((aligned(64)));
  for (int z = z0; z < z1; z++) for (int top = i0; top < i1; top += MB)
  for (int j = j0; j < j1; j += NR) for (int p = 0; p < P; p += PC) {
    const int jn = MIN(J - j, NR), pn = MIN(P - p, PC), end = MIN(i1, top + MB);
#if B_T
    for (int h = 0; h < 2; h++) for (int q = 0; q < pn; q += W) {
      vec v[W];
      UNROLL for (int r = 0; r < W; r++)
        v[r] = load(b + z * (long)J * K * (BITS / 8), scale, MIN(j + h * W + r, J - 1), (p + q) * (long)L);
      transpose(v);
      UNROLL for (int r = 0; r < W; r++) panel[2 * (q + r) + h] = v[r];
    }
#else
    const float *row = (const float *)b + (z * (long)K + p) * J + j, *last = (const float *)b + BATCH * (long)K * J - NR;
    for (int q = 0; q < pn; q++, row += J) {
      if (row <= last) {  // what it reads too much is never stored
        panel[2 * q] = *(vec *)row;
        panel[2 * q + 1] = *(vec *)(row + W);
      } else for (int r = 0; r < NR; r++) ((float *)panel)[q * NR + r] = r < jn ? row[r] : 0;
    }
#endif
    float *o = out + z * (long)I * J + j;
    const lane *t = a + z * (long)I * K + p * (long)A_P;
    const float *s = BITS == 8 && p + PC >= P ? scale + j : 0;
    for (int i = top; i < end; i += MR) {
      float *oi = o + i * (long)J;
      const lane *ti = t + i * (long)A_I;
      if (i + MR > end) tile(I % MR, NR, oi, ti, panel, pn, jn, p > 0, s);
      else if (jn > W) tile(MR, NR, oi, ti, panel, pn, jn, p > 0, s);
      else tile(MR, W, oi, ti, panel, pn, jn, p > 0, s);
    }
  }
#endif
}
#endif
#endif
