/* Pages of turboq's packed KV cache: reading the stored form in C99, without dependencies.
 *
 * A page is 256 tokens of one sequence, made of little-endian 32-bit words. There are two kinds.
 *
 * Pages of columns (turboq/cache/columns.py: learned plans, all layers and heads in one pool). A
 * stored vector is a row of `width` bits, one column each, in the order of the codec's fields, each
 * plane by plane and channel by channel; column t is bit `plane[t]` of the unsigned number
 * `entry[t]` (a code, a gain). Of a head that begins at column `start`, of token 8 j + r of a page,
 *
 *     words[8 start + width r + t] bit j  =  column t
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

/* Where one head lies in a page of columns. */
typedef struct {
  uint32_t start; /* first column of the head in the pool */
  uint32_t width; /* columns of the head */
} turboq_head;

/* The unsigned numbers of every token of a page: entries[token][count], which it overwrites.
 * entry and plane [head.width] say what the columns mean; every entry is below count. */
void turboq_entries(const uint32_t *words, turboq_head head, const int32_t *entry,
                    const int32_t *plane, uint32_t count, uint32_t *entries);

/* dots[token] = sum over columns t of weights[t] times column t, for the first `columns` columns. */
void turboq_dots(const uint32_t *words, turboq_head head, uint32_t columns, const float *weights,
                 float *dots);

/* sums[t] += sum over the page's tokens of p[token] times column t, for the first `columns`. */
void turboq_sums(const uint32_t *words, turboq_head head, uint32_t columns, const float *p,
                 float *sums);

/* Codes of a page of planes: codes[token][channels], tokens = 32 rows. bits is 1 to 8. */
void turboq_codes(const uint32_t *words, uint32_t bits, uint32_t rows, uint32_t channels,
                  uint8_t *codes);

/* A stored float16 (a scale, a gain), which is an entry of 16 bits, as a number. */
float turboq_half(uint32_t bits);

#endif
