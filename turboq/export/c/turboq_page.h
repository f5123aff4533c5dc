/* Pages of turboq's packed KV cache: reading the stored form in C99, without dependencies.
 *
 * A page is 256 tokens of one sequence, made of little-endian 32-bit words. There are two kinds.
 *
 * Pages of columns (turboq/cache/columns.py: learned plans, all layers and heads in one pool). A
 * stored vector is a row of bits, one column each, and a page has the columns of all heads and
 * layers side by side, `lanes` of them. Column t of a head lies in lane[t] and is bit plane[t] of the
 * unsigned number entry[t] (a code, a gain). Of token 32 j + 8 b + r of a page,
 *
 *     words[r lanes + lane[t]] bit 8 b + j  =  column t
 *
 * Pages of planes (turboq/numbers/packing.py: one field of `channels` codes of `bits` bits), with
 * rows = tokens / 32, for pages of 256 or 64 tokens. Of token rows j + r,
 *
 *     words[(p rows + r) channels + c] bit j  =  bit p of the code of channel c
 *
 * Codecs whose values are linear in their bits (turboq/codecs/bit_form.py) need no code at all:
 *
 *     x_hat = mean + scale (M s + constant)     s: the columns of the codes, 0 or 1
 *     keys    q . x_hat = scale ((M^T q) . s + q . constant) + q . mean          turboq_dots
 *     values  sum_n p_n x_hat_n = M (sum_n p_n scale_n s_n) + ...                turboq_sums
 */
#ifndef TURBOQ_PAGE_H
#define TURBOQ_PAGE_H

#include <stdint.h>

#define TURBOQ_PAGE 256 /* tokens of a page of columns */
#define TURBOQ_ROWS 8

/* Some columns of one head: all of them, or only those of its codes. */
typedef struct {
  uint32_t lanes;      /* of a page */
  uint32_t count;      /* columns */
  const int32_t *lane; /* [count] */
} turboq_columns;

/* The unsigned numbers of every token of a page: entries[token][width], which it overwrites.
 * entry and plane [count] say what the columns mean; every entry is below width. */
void turboq_entries(const uint32_t *words, turboq_columns columns, const int32_t *entry,
                    const int32_t *plane, uint32_t width, uint32_t *entries);

/* dots[token] = sum over columns t of weights[t] times column t. */
void turboq_dots(const uint32_t *words, turboq_columns columns, const float *weights, float *dots);

/* sums[t] += sum over the page's tokens of p[token] times column t. */
void turboq_sums(const uint32_t *words, turboq_columns columns, const float *p, float *sums);

/* Codes of a page of planes: codes[token][channels], tokens = 32 rows. bits is 1 to 8. */
void turboq_codes(const uint32_t *words, uint32_t bits, uint32_t rows, uint32_t channels,
                  uint8_t *codes);

/* A stored float16 (a scale, a gain), which is an entry of 16 bits, as a number. */
float turboq_half(uint32_t bits);

#endif
