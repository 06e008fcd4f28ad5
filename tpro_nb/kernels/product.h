/* Products of a few rows with a packed matrix. */
#ifndef TPRO_NB_PRODUCT_H
#define TPRO_NB_PRODUCT_H

#include "lanes.h"
#include "team.h"

/* y = x w, or y += x w with `add`: this thread's share of the outputs.
   x: [n_rows][n_in]. y: [n_rows][n_out]. w: for every block of 16 outputs all inputs in order, a
   unit of inputs (two in bf16, one in fp32) for all 16 outputs after another. */
void product(const Weight *x, const Weight *w, float *y, int n_rows, int n_out, int n_in, int add,
             const Thread *me);

#endif
