/* The reader of turboq_page.h. Plain loops, to be read and replaced by an engine's own. */
#include "turboq_page.h"

#include <math.h>
#include <string.h>

/* The layout of columns, stated once: the word of tokens row, 8 + row, ..., 248 + row of a column,
 * and the token of its bit i = 8 b + j. */
static uint32_t word_of(const uint32_t *words, turboq_columns columns, uint32_t row, uint32_t t) {
  return words[(size_t)row * columns.lanes + (uint32_t)columns.lane[t]];
}

static uint32_t token_of(uint32_t row, uint32_t i) { return 32 * (i % 8) + 8 * (i / 8) + row; }

void turboq_entries(const uint32_t *words, turboq_columns columns, const int32_t *entry,
                    const int32_t *plane, uint32_t width, uint32_t *entries) {
  memset(entries, 0, (size_t)TURBOQ_PAGE * width * sizeof *entries);
  for (uint32_t row = 0; row < TURBOQ_ROWS; row++)
    for (uint32_t t = 0; t < columns.count; t++) {
      const uint32_t word = word_of(words, columns, row, t);
      for (uint32_t i = 0; i < 32; i++)
        entries[(size_t)token_of(row, i) * width + (uint32_t)entry[t]] |=
            (word >> i & 1u) << plane[t];
    }
}

void turboq_dots(const uint32_t *words, turboq_columns columns, const float *weights, float *dots) {
  memset(dots, 0, TURBOQ_PAGE * sizeof *dots);
  for (uint32_t row = 0; row < TURBOQ_ROWS; row++)
    for (uint32_t t = 0; t < columns.count; t++) {
      const uint32_t word = word_of(words, columns, row, t);
      for (uint32_t i = 0; i < 32; i++)
        if (word >> i & 1u) dots[token_of(row, i)] += weights[t];
    }
}

void turboq_sums(const uint32_t *words, turboq_columns columns, const float *p, float *sums) {
  for (uint32_t row = 0; row < TURBOQ_ROWS; row++)
    for (uint32_t t = 0; t < columns.count; t++) {
      const uint32_t word = word_of(words, columns, row, t);
      for (uint32_t i = 0; i < 32; i++)
        if (word >> i & 1u) sums[t] += p[token_of(row, i)];
    }
}

void turboq_codes(const uint32_t *words, uint32_t bits, uint32_t rows, uint32_t channels,
                  uint8_t *codes) {
  memset(codes, 0, (size_t)32 * rows * channels);
  for (uint32_t p = 0; p < bits; p++)
    for (uint32_t row = 0; row < rows; row++)
      for (uint32_t c = 0; c < channels; c++) {
        const uint32_t word = words[((size_t)p * rows + row) * channels + c];
        for (uint32_t j = 0; j < 32; j++)
          codes[(size_t)(rows * j + row) * channels + c] |= (uint8_t)((word >> j & 1u) << p);
      }
}

float turboq_half(uint32_t bits) {
  const float sign = bits >> 15 & 1u ? -1.0f : 1.0f;
  const int exponent = (int)(bits >> 10 & 31u);
  const uint32_t fraction = bits & 1023u;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexpf((float)fraction, -24);
  return sign * ldexpf((float)(fraction + 1024u), exponent - 25);
}
