/* recurrent.metal: causal_conv, gated_delta_rule: layers with a state of fixed size for each conversation.
 * Reference: pyengine/ops/recurrent.py: causal_conv, gated_delta_rule.
 *
 * conv_rows    A thread owns one channel of one row. It looks back for the row at which its conversation begins in this step, at most as
 *              far as the taps reach, and reads what lies before from the state. Bound by memory: 4 (taps + 1) bytes an element at most.
 * delta_rows   A threadgroup of 4 simdgroups owns 32 columns of one head's matrix [e, f] and walks all rows of the step. Lane 8 p + c of a
 *              simdgroup keeps elements p, p + 4, p + 8 ... of column c in registers (PER of them); a sum over a column is a sum of
 *              each thread's own elements, and two shuffles: parts (0 + 1) + (2 + 3). q and k of ROWS rows, v, decay and beta
 *              pass through threadgroup memory, 8 e + 136 bytes a row. 7 e f operations a row and head; the state is read and written
 *              once a step. One row is bound by the state's memory, a prompt by the latency of a row.
 * Operations are those of csrc/cpu/recurrent.c in their order, so results are the CPU's to the bit. No cell is read and written in one launch.
 */
#include "activations.h"

enum { FOLLOWS = -2, PARTS = 4, COLUMNS = 32, ROWS = 8, MOST_PER = 64 };

PE_CONSTANT(int, PER, 0);       /* elements of a column that a thread keeps */

/* Whether row i may go on from a cell, and leave its state in one; the thread that `says` so notes why not. */
static inline bool right_cells(int i, int from, int to, int cells, bool says, device pe_fault *fault) {
  const bool wrong = from < (i ? (int)FOLLOWS : -1) || from >= cells;
  if (!wrong && to < cells) return true;
  if (says) raise_fault(fault, FAULT_BAD_VALUE, wrong ? from : to, cells);
  return false;
}

struct conv_args {
  int rows, width, taps, cells;
  long head, cell;              /* floats from one input of a state to the next, and from one cell to the next */
};

kernel void conv_rows(constant conv_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device const float *weight [[buffer(2)]],
                      device float *state [[buffer(3)]], device const int *before [[buffer(4)]], device const int *after [[buffer(5)]],
                      device float *out [[buffer(6)]], device pe_fault *fault [[buffer(7)]],
                      uint3 group [[threadgroup_position_in_grid]], uint number [[thread_index_in_threadgroup]],
                      uint3 threads [[threads_per_threadgroup]]) {
  const int c = (int)(group.x * threads.x + number), i = (int)group.y;
  if (c >= a.width) return;
  int start = i;                /* of the rows that a tap reaches, the first one of this conversation */
  while (start > 0 && start > i - a.taps + 1 && before[start] == FOLLOWS) start--;
  const int cell = before[start], to = after[i];
  if (!right_cells(start, cell, to, a.cells, c == 0, fault)) return;
  float sum = 0.0f;
  for (int j = 0; j < a.taps; j++) {
    const int row = i - a.taps + 1 + j;
    float v = 0.0f;
    if (row >= start) v = x[(long)row * a.width + c];
    else if (cell >= 0) v = state[(row - start + a.taps - 1) * a.head + cell * a.cell + c];
    sum = fma(weight[(long)j * a.width + c], v, sum);
  }
  out[(long)i * a.width + c] = sum;
  for (int j = 0; to >= 0 && j < a.taps - 1; j++) {
    const int row = i - a.taps + 2 + j;
    float v = 0.0f;
    if (row >= start) v = x[(long)row * a.width + c];
    else if (cell >= 0) v = state[(row - start + a.taps - 1) * a.head + cell * a.cell + c];
    state[j * a.head + to * a.cell + c] = v;
  }
}

/* Sum over a column of what its four threads have. All of them get it. */
static inline float over_column(float v) {
  v += simd_shuffle_xor(v, 8);
  return v + simd_shuffle_xor(v, 16);
}

struct delta_args {
  int rows, heads, width, keys, e, cells, tiled;
  long head, cell;              /* floats from one head of a state to the next, and from one cell to the next */
};

kernel void delta_rows(constant delta_args &a [[buffer(0)]], device const float *q [[buffer(1)]], device const float *k [[buffer(2)]],
                       device const float *v [[buffer(3)]], device const float *log_decay [[buffer(4)]],
                       device const float *beta [[buffer(5)]], device float *state [[buffer(6)]], device const int *before [[buffer(7)]],
                       device const int *after [[buffer(8)]], device float *out [[buffer(9)]], device pe_fault *fault [[buffer(10)]],
                       threadgroup float *memory [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                       uint number_ [[thread_index_in_threadgroup]], uint3 threads [[threads_per_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const int number = (int)number_, all = (int)threads.x, room = PARTS * PER, head = (int)group.y, first = (int)group.x * COLUMNS;
  const int part = (int)lane / 8, column = (int)simdgroup * 8 + (int)lane % 8, at = first + column;
  const int key = a.tiled ? head % a.keys : head / (a.heads / a.keys);
  threadgroup float *ks = memory, *qs = ks + ROWS * room, *vs = qs + ROWS * room, *decays = vs + ROWS * COLUMNS, *betas = decays + ROWS;
  const bool mine = at < a.width, says = head == 0 && first == 0 && number == 0;
  float s[MOST_PER];
  for (int j = 0; j < PER; j++) s[j] = 0.0f;
  for (int i0 = 0; i0 < a.rows; i0 += ROWS) {
    const int n = min((int)ROWS, a.rows - i0);
    threadgroup_barrier(mem_flags::mem_threadgroup);  /* all have read the rows before these */
    for (int j = number; j < n * room; j += all) {
      const int row = j / room, d = j % room;
      const long from = ((long)(i0 + row) * a.keys + key) * a.e + d;
      ks[j] = d < a.e ? k[from] : 0.0f;
      qs[j] = d < a.e ? q[from] : 0.0f;
    }
    for (int j = number; j < n * COLUMNS; j += all) {
      const int row = j / COLUMNS, c = first + j % COLUMNS;
      vs[j] = c < a.width ? v[((long)(i0 + row) * a.heads + head) * a.width + c] : 0.0f;
    }
    if (number < n) {
      decays[number] = exp_of(log_decay[(long)(i0 + number) * a.heads + head]);
      betas[number] = beta[(long)(i0 + number) * a.heads + head];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int row = 0; row < n; row++) {
      const int i = i0 + row, from = before[i], to = after[i];
      if (!right_cells(i, from, to, a.cells, says, fault)) return;      /* all threads of the threadgroup alike */
      if (from != FOLLOWS)
        for (int j = 0; j < PER; j++) {
          const int d = part + PARTS * j;
          s[j] = from >= 0 && mine && d < a.e ? state[head * a.head + from * a.cell + (long)d * a.width + at] : 0.0f;
        }
      threadgroup const float *kr = ks + row * room + part, *qr = qs + row * room + part;
      float sum = 0.0f;
      for (int j = 0; j < PER; j++) sum = fma(kr[PARTS * j], s[j], sum);
      const float seen = over_column(sum), fades = decays[row];
      const float change = betas[row] * (vs[row * COLUMNS + column] - seen * fades);
      sum = 0.0f;
      for (int j = 0; j < PER; j++) {
        s[j] = fma(kr[PARTS * j], change, s[j] * fades);
        sum = fma(qr[PARTS * j], s[j], sum);
      }
      const float y = over_column(sum);
      if (mine && part == 0) out[((long)i * a.heads + head) * a.width + at] = y;
      for (int j = 0; to >= 0 && mine && j < PER; j++) {
        const int d = part + PARTS * j;
        if (d < a.e) state[head * a.head + to * a.cell + (long)d * a.width + at] = s[j];
      }
    }
  }
}
