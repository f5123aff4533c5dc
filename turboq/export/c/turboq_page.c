/* The reader of turboq_page.h. Plain loops, to be read and replaced by an engine's own. */
#include "turboq_page.h"

#include <math.h>
#include <string.h>

/* The word with a column's bits of tokens row, 8 + row, ..., 248 + row: the layout's only statement. */
static uint32_t word_of(const uint32_t *words, turboq_head head, uint32_t row, uint32_t column) {
  return words[(size_t)TURBOQ_ROWS * head.start + (size_t)head.width * row + column];
}

void turboq_entries(const uint32_t *words, turboq_head head, const int32_t *entry,
                    const int32_t *plane, uint32_t count, uint32_t *entries) {
  memset(entries, 0, (size_t)TURBOQ_PAGE * count * sizeof *entries);
  for (uint32_t row = 0; row < TURBOQ_ROWS; row++)
    for (uint32_t t = 0; t < head.width; t++) {
      const uint32_t word = word_of(words, head, row, t);
      for (uint32_t j = 0; j < 32; j++)
        entries[(size_t)(TURBOQ_ROWS * j + row) * count + (uint32_t)entry[t]] |=
            (word >> j & 1u) << plane[t];
    }
}

void turboq_dots(const uint32_t *words, turboq_head head, uint32_t columns, const float *weights,
                 float *dots) {
  memset(dots, 0, TURBOQ_PAGE * sizeof *dots);
  for (uint32_t row = 0; row < TURBOQ_ROWS; row++)
    for (uint32_t t = 0; t < columns; t++) {
      const uint32_t word = word_of(words, head, row, t);
      for (uint32_t j = 0; j < 32; j++)
        if (word >> j & 1u) dots[TURBOQ_ROWS * j + row] += weights[t];
    }
}

void turboq_sums(const uint32_t *words, turboq_head head, uint32_t columns, const float *p,
                 float *sums) {
  for (uint32_t row = 0; row < TURBOQ_ROWS; row++)
    for (uint32_t t = 0; t < columns; t++) {
      const uint32_t word = word_of(words, head, row, t);
      for (uint32_t j = 0; j < 32; j++)
        if (word >> j & 1u) sums[t] += p[TURBOQ_ROWS * j + row];
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
