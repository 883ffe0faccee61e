/* A decode step on a CPU: whole numbers are multiplied as they are stored, in few calls a layer.

A weight is in tiles of 16 rows x 32 columns, those of the same rows one after another. A tile:

    codes    of four bits 256 bytes: the byte at 64 j + 4 r + i has row r's column 4 j + i in its
             lower half and 4 (j + 4) + i in its upper one; of eight 512: that of column 4 j + i
    scales   16 float16
    offsets  16 float16

    number = code * scale + offset

Of x each run of 32 numbers becomes whole numbers of eight bits, which have a scale together. Sums
of a run are exact; runs are added up in order, in float32. So a token's results do not depend on
how many tokens there are. What is not finite makes a whole run NaN.

Activations are bfloat16, row after row. Compiled by native.py, which checks what is given. What
returns a number returns 1, and results are not whole, where there is no memory to work in. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
enum { ROWS = 16, RUN = 32, MOST = 8, MOST_DIM = 256, AT_ONCE = 256 };
#define TILE_BYTES(is_wide) (ROWS * (RUN / ((is_wide) ? 1 : 2) + 4))

typedef struct {
    const uint8_t *tiles;
    const float *bias; /* [num_out], or NULL */
    int64_t num_out, num_in;
    int32_t is_wide; /* codes have eight bits */
    float scale;     /* what results are multiplied by, bias included */
} Weight;

typedef struct {
    int8_t *codes;              /* [T, K] */
    float *scale, *scaled_sum;  /* [T, K / RUN] */
} Codes;

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : rounded;
}

/* exp(x) within 2e-7 of it; NaN of NaN. */
static inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4b400000 + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

/* ---- products ---- */

#ifdef __clang__
#define COMPILER __VERSION__
#else
#define COMPILER "gcc " __VERSION__
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
const char *const native_name = "native avx512_vnni " COMPILER;
enum { LANES = 16 };
typedef __m512 Floats;
typedef __m512i Ints;
#define LOAD(p) _mm512_loadu_si512(p)
#define LOWER(v) _mm512_and_si512(v, _mm512_set1_epi8(15))
#define UPPER(v) _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))
#define NO_INTS _mm512_setzero_si512()
#define NO_FLOATS _mm512_setzero_ps()
#define TO_FLOATS(v) _mm512_cvtepi32_ps(v)
#define HALVES(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define ALL(x) _mm512_set1_ps(x)
#define TIMES(a, b) _mm512_mul_ps(a, b)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define ADD_INTS(a, b) _mm512_add_epi32(a, b)
#define WIDEN(p) _mm512_castsi512_ps(_mm512_slli_epi32( \
    _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
static inline float added_up(Floats x) { return _mm512_reduce_add_ps(x); }
/* sums + four columns of LANES rows times four numbers */
static inline Ints dot(Ints sums, Ints codes, int32_t x, int is_wide) {
    return _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(x));
}
#else
const char *const native_name = "native avx2 " COMPILER;
enum { LANES = 8 };
typedef __m256 Floats;
typedef __m256i Ints;
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOWER(v) _mm256_and_si256(v, _mm256_set1_epi8(15))
#define UPPER(v) _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15))
#define NO_INTS _mm256_setzero_si256()
#define NO_FLOATS _mm256_setzero_ps()
#define TO_FLOATS(v) _mm256_cvtepi32_ps(v)
#define HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define ALL(x) _mm256_set1_ps(x)
#define TIMES(a, b) _mm256_mul_ps(a, b)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define ADD_INTS(a, b) _mm256_add_epi32(a, b)
#define WIDEN(p) _mm256_castsi256_ps(_mm256_slli_epi32( \
    _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
static inline float added_up(Floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
static inline Ints dot(Ints sums, Ints codes, int32_t x, int is_wide) {
    Ints all = _mm256_set1_epi32(x);
    if (!is_wide) {
        Ints pairs = _mm256_maddubs_epi16(codes, all);
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    /* Two products of eight bits each are too much for sixteen. */
    Ints even = _mm256_and_si256(codes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(codes, 8);
    Ints x_even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), x_odd = _mm256_srai_epi16(all, 8);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, x_even));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(odd, x_odd));
}
#endif

/* `count` tokens from `first` on times LANES of a tile's rows -> out [count, ROWS]. */
static inline __attribute__((always_inline)) void
multiply(const Weight *w, const uint8_t *tile, const Codes *x, int64_t first, const int count,
         const int is_wide, const int lane, float *out) {
    const int64_t num_in = w->num_in, runs = num_in / RUN;
    const int code_bytes = ROWS * RUN / (is_wide ? 1 : 2);
    const int8_t *codes = x->codes + first * num_in;
    const float *scales = x->scale + first * runs, *sums = x->scaled_sum + first * runs;
    Floats totals[MOST];
    for (int t = 0; t < count; t++) totals[t] = NO_FLOATS;
    for (int64_t run = 0; run < runs; run++, tile += TILE_BYTES(is_wide)) {
        Ints steps[8];
        const uint8_t *at = tile + 4 * lane;
        for (int j = 0; j < (is_wide ? 8 : 4); j++) {
            steps[j] = LOAD(at + 64 * j);
            if (!is_wide) steps[j + 4] = UPPER(steps[j]), steps[j] = LOWER(steps[j]);
        }
        Floats scale = HALVES(tile + code_bytes + 2 * lane);
        Floats offset = HALVES(tile + code_bytes + 2 * (ROWS + lane));
#pragma GCC unroll 8
        for (int t = 0; t < count; t++) {
            int32_t four[8];
            memcpy(four, codes + t * num_in + run * RUN, RUN);
            Ints dots = NO_INTS, others = NO_INTS;
            for (int j = 0; j < 8; j += 2) {
                dots = dot(dots, steps[j], four[j], is_wide);
                others = dot(others, steps[j + 1], four[j + 1], is_wide);
            }
            dots = ADD_INTS(dots, others);
            Floats step = TIMES(scale, ALL(scales[t * runs + run]));
            totals[t] = FMA(TO_FLOATS(dots), step, totals[t]);
            totals[t] = FMA(offset, ALL(sums[t * runs + run]), totals[t]);
        }
    }
    for (int t = 0; t < count; t++) STORE(out + t * ROWS + lane, totals[t]);
}

#define CASE(n) \
    case n: \
        for (int lane = 0; lane < ROWS; lane += LANES) \
            if (w->is_wide) multiply(w, tile, x, first, n, 1, lane, out); \
            else multiply(w, tile, x, first, n, 0, lane, out); \
        break;

static void multiply_some(const Weight *w, const uint8_t *tile, const Codes *x, int64_t first,
                          int count, float *out) {
    switch (count) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    }
}

/* (x * weight^T + bias) * scale + residual; `wide` or `out`, [T, num_out], is written. */
static void product(const Weight *w, const Codes *x, int64_t tokens, const bf16 *residual,
                    bf16 *out, float *wide, int threads) {
    int64_t n = w->num_out, blocks = (n + ROWS - 1) / ROWS, runs = w->num_in / RUN;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const uint8_t *tile = w->tiles + block * runs * TILE_BYTES(w->is_wide);
        int64_t start = block * ROWS, rows = n - start < ROWS ? n - start : ROWS;
        for (int64_t first = 0; first < tokens; first += MOST) {
            float y[MOST * ROWS];
            int count = tokens - first < MOST ? tokens - first : MOST;
            multiply_some(w, tile, x, first, count, y);
            for (int t = 0; t < count; t++) {
                int64_t at = (first + t) * n + start;
                for (int64_t r = 0; r < rows; r++) {
                    float each = y[t * ROWS + r];
                    if (w->bias) each += w->bias[start + r];
                    each *= w->scale;
                    if (wide) wide[at + r] = each;
                    else out[at + r] = narrow(residual ? each + widen(residual[at + r]) : each);
                }
            }
        }
    }
}

/* `scale` is to be freed; NULL: there is no memory. */
static Codes room_for(int64_t tokens, int64_t size) {
    int64_t runs = tokens * (size / RUN);
    float *scale = malloc(tokens * size + runs * 2 * sizeof(float));
    if (!scale) return (Codes){NULL, NULL, NULL};
    return (Codes){(int8_t *)(scale + 2 * runs), scale, scale + runs};
}

static void quantise(const float *x, int64_t size, int64_t token, Codes *out) {
    for (int64_t run = 0; run < size / RUN; run++, x += RUN) {
        int8_t *codes = out->codes + token * size + run * RUN;
        uint32_t bits[RUN], largest = 0;
        int32_t sum = 0;
        memcpy(bits, x, sizeof(bits));
        for (int i = 0; i < RUN; i++) {
            uint32_t each = bits[i] & 0x7fffffff;
            largest = each > largest ? each : largest;
        }
        float most;
        memcpy(&most, &largest, 4);
        int is_finite = largest < 0x7f800000, has_any = is_finite && most > 1e-30f;
        float scale = !is_finite ? NAN : has_any ? most / 127 : 0, steps = has_any ? 127 / most : 0;
        for (int i = 0; i < RUN; i++) {
            /* To the nearest, ties to even. */
            float shifted = (has_any ? x[i] * steps : 0) + 12582912.0f;
            int32_t code;
            memcpy(&code, &shifted, 4);
            code -= 0x4b400000;
            codes[i] = code;
            sum += code;
        }
        out->scale[token * (size / RUN) + run] = scale;
        out->scaled_sum[token * (size / RUN) + run] = scale * sum;
    }
}

/* x [T, size] in codes; with a norm, [size] of bfloat16 or float32, of norm(x). */
static void make_codes(const bf16 *x, int64_t tokens, int64_t size, const void *norm,
                       int norm_is_wide, float eps, Codes *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 1)
    for (int64_t t = 0; t < tokens; t++) {
        float wide[size], squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < size; i++) {
            wide[i] = widen(x[t * size + i]);
            squares += wide[i] * wide[i];
        }
        if (norm) {
            float scale = 1 / sqrtf(squares / size + eps);
            if (norm_is_wide)
                for (int64_t i = 0; i < size; i++) wide[i] *= scale * ((const float *)norm)[i];
            else
                for (int64_t i = 0; i < size; i++) wide[i] *= scale * widen(((const bf16 *)norm)[i]);
        }
        quantise(wide, size, t, out);
    }
}

int native_linear(const Weight *w, const bf16 *x, int64_t tokens, const void *norm,
                  int norm_is_wide, float eps, const bf16 *residual, bf16 *out, int threads) {
    Codes codes = room_for(tokens, w->num_in);
    if (!codes.scale) return 1;
    make_codes(x, tokens, w->num_in, norm, norm_is_wide, eps, &codes, threads);
    product(w, &codes, tokens, residual, out, NULL, threads);
    free(codes.scale);
    return 0;
}

/* down * (silu(gate) up) + residual, (gate, up) = gate_up * norm(x). Some tokens at once: what is
between takes more memory than all else. `out` may be `x`: only a token's own row is read. */
int native_gated_mlp(const Weight *gate_up, const Weight *down, const bf16 *x, int64_t tokens,
                     const void *norm, int norm_is_wide, float eps, const bf16 *residual,
                     bf16 *out, int threads) {
    int64_t size = down->num_in, most = tokens < AT_ONCE ? tokens : AT_ONCE;
    Codes codes = room_for(most, gate_up->num_in), between = room_for(most, size);
    float *wide = malloc(most * 2 * size * sizeof(float));
    int is_missing = !codes.scale || !between.scale || !wide;
    for (int64_t first = 0; first < tokens && !is_missing; first += most) {
        int64_t count = tokens - first < most ? tokens - first : most;
        int64_t at = first * down->num_out;
        make_codes(x + first * gate_up->num_in, count, gate_up->num_in, norm, norm_is_wide, eps,
                   &codes, threads);
        product(gate_up, &codes, count, NULL, NULL, wide, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > 1)
        for (int64_t t = 0; t < count; t++) {
            float *gate = wide + t * 2 * size, *up = gate + size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) gate[i] *= up[i] / (1 + exponential(-gate[i]));
            quantise(gate, size, t, &between);
        }
        product(down, &between, count, residual ? residual + at : NULL, out + at, NULL, threads);
    }
    free(wide);
    free(between.scale);
    free(codes.scale);
    return is_missing;
}

/* ---- attention ---- */

/* qkv [T, heads + 2 kv_heads, dim]: turned queries go to `query` [T, heads, dim], turned keys and
values to rows of `cache` [any, dim]; cos, sin [T, dim]; slots [2, T, kv_heads]. */
void native_rope_and_store(const bf16 *qkv, const bf16 *cos, const bf16 *sin, const int64_t *slots,
                           bf16 *cache, bf16 *query, int64_t tokens, int64_t heads,
                           int64_t kv_heads, int64_t dim) {
    int64_t half = dim / 2;
    for (int64_t t = 0; t < tokens; t++) {
        const bf16 *x = qkv + t * (heads + 2 * kv_heads) * dim;
        const bf16 *c = cos + t * dim, *s = sin + t * dim;
        for (int64_t h = 0; h < heads + kv_heads; h++, x += dim) {
            bf16 *out = h < heads ? query + (t * heads + h) * dim
                                  : cache + slots[t * kv_heads + h - heads] * dim;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float first = widen(x[i]), second = widen(x[i + half]);
                out[i] = narrow(first * widen(c[i]) + second * widen(s[i]));
                out[i + half] = narrow(second * widen(c[i + half]) + first * widen(s[i + half]));
            }
        }
        for (int64_t h = 0; h < kv_heads; h++, x += dim)
            memcpy(cache + slots[(tokens + t) * kv_heads + h] * dim, x, dim * sizeof(bf16));
    }
}

/* One row's queries that share keys: query [group, LANES * n] -> out. `keys`, `values` [blocks]: rows of
the cache. */
static inline __attribute__((always_inline)) int
attend(const bf16 *query, const bf16 *cache, const int64_t *keys, const int64_t *values,
       int64_t first, int64_t last, bf16 *out, int64_t group, int64_t block_size, float scale,
       const int n) {
    const int64_t dim = LANES * n, block = block_size * dim;
    float *weights = malloc((last + block_size) * sizeof(float));
    if (!weights) return 1;
    for (int64_t g = 0; g < group; g++) {
        Floats q[MOST_DIM / LANES], sums[MOST_DIM / LANES];
        float most = -INFINITY, total = 0;
        for (int i = 0; i < n; i++) q[i] = TIMES(WIDEN(query + g * dim + LANES * i), ALL(scale));
        for (int i = 0; i < n; i++) sums[i] = NO_FLOATS;
        for (int64_t start = first - first % block_size; start < last; start += block_size) {
            const bf16 *key = cache + keys[start / block_size] * block;
            /* Slots before and behind those that are seen count for nothing. */
            for (int64_t j = 0; j < block_size; j++, key += dim) {
                Floats products = TIMES(q[0], WIDEN(key));
                for (int i = 1; i < n; i++) products = FMA(q[i], WIDEN(key + LANES * i), products);
                weights[start + j] = added_up(products);
            }
        }
        for (int64_t p = first; p < last; p++) most = weights[p] > most ? weights[p] : most;
#pragma omp simd reduction(+ : total)
        for (int64_t p = first; p < last; p++) {
            weights[p] = exponential(weights[p] - most);
            total += weights[p];
        }
        for (int64_t p = first; p < last; p++) {
            const bf16 *value = cache + values[p / block_size] * block + p % block_size * dim;
            for (int i = 0; i < n; i++)
                sums[i] = FMA(ALL(weights[p]), WIDEN(value + LANES * i), sums[i]);
        }
        for (int i = 0; i < n; i++) {
            float each[LANES];
            STORE(each, sums[i]);
            for (int j = 0; j < LANES; j++) out[g * dim + LANES * i + j] = narrow(each[j] / total);
        }
    }
    free(weights);
    return 0;
}

/* query [U, kv_heads, group, dim], one token of each of U rows -> that shape. `rows` [2, U,
kv_heads, blocks] are of the cache, [any, block_size, dim]; `spans` [U, 2]: the first position in
them that a token sees, and the one behind the last. */
int native_attention(const bf16 *query, const bf16 *cache, const int64_t *rows,
                     const int64_t *spans, bf16 *out, int64_t units, int64_t kv_heads,
                     int64_t group, int64_t blocks, int64_t block_size, int64_t dim, float scale,
                     int threads) {
    int is_missing = 0;
#pragma omp parallel for num_threads(threads) reduction(| : is_missing) if (threads > 1)
    for (int64_t unit = 0; unit < units * kv_heads; unit++) {
        int64_t first = spans[2 * (unit / kv_heads)], last = spans[2 * (unit / kv_heads) + 1];
        const int64_t *keys = rows + unit * blocks, *values = keys + units * kv_heads * blocks;
        const bf16 *q = query + unit * group * dim;
        bf16 *y = out + unit * group * dim;
#define ATTEND(size) attend(q, cache, keys, values, first, last, y, group, block_size, scale, size)
        if (dim == 64) is_missing |= ATTEND(64 / LANES);
        else if (dim == 128) is_missing |= ATTEND(128 / LANES);
        else is_missing |= ATTEND(dim / LANES);
    }
    return is_missing;
}
