/* nearest_rows.h: the working memory of nearest_rows.c. */
#ifndef PE_NEAREST_ROWS_H
#define PE_NEAREST_ROWS_H

#include <stdint.h>

enum { NEAREST_ROWS = 24, NEAREST_PANEL = 64 };

typedef struct nearest_work {
  double *inverse;     /* [n_kept] 1 / length of kept rows */
  float *panels;       /* [panels][width][NEAREST_PANEL] kept rows of length 1: column c of a panel is one row */
  float *rows;         /* [NEAREST_ROWS][width] evicted rows of length 1 */
  float *scores;       /* [NEAREST_ROWS][panels][NEAREST_PANEL] */
  float *largest;      /* [panels] of one row's scores */
  int64_t n_panels;
} nearest_work;

/* Lay it out from `base`; returns the bytes it takes. With w null only they are counted. */
static inline int64_t nearest_memory(nearest_work *w, char *base, int64_t n_kept, int64_t width) {
  const int64_t panels = (n_kept + NEAREST_PANEL - 1) / NEAREST_PANEL;
  const int64_t doubles = 8 * n_kept, kept = 4 * panels * NEAREST_PANEL * width, rows = 4 * NEAREST_ROWS * width;
  const int64_t scores = 4 * NEAREST_ROWS * panels * NEAREST_PANEL;
  if (w) {
    char *at = base + doubles;
    *w = (nearest_work){(double *)base, (float *)at, (float *)(at + kept), (float *)(at + kept + rows),
                        (float *)(at + kept + rows + scores), panels};
  }
  return doubles + kept + rows + scores + 4 * panels;
}

#endif
