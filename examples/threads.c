// Threads for the kernels of fast.c: fast.py puts this behind each of them, and `kernel`, which tinygrad calls, shares
// the parts of `share` among the threads that wait. A call costs less than a microsecond while these are awake.
//
// `pool` is memory of the process, 64 words. Who has work writes what it is, and then one word: which turn this is, how
// many parts it has, and the next one to be taken. A thread takes a part by adding one to that word, so that one which
// is late finds none, and nobody waits for one that the system does not run. Of two callers at once the second does its
// work alone, and so does everybody after a fork, which has no such threads.
typedef unsigned long word;
typedef void (*task)(void **, int);
enum {WORD, LEFT = 8, TASK = 16, POINTERS, BUSY = 24, ASLEEP, WAIT, POST, YIELD, SEMAPHORE};  // from WAIT on of fast.py
#if defined(__x86_64__)
#define PAUSE __builtin_ia32_pause()
#else
#define PAUSE __asm__ volatile("yield")
#endif
#define READ(i) __atomic_load_n(&pool[i], __ATOMIC_SEQ_CST)
#define WRITE(i, value) __atomic_store_n(&pool[i], value, __ATOMIC_SEQ_CST)
#define ADD(i, value) __atomic_fetch_add(&pool[i], value, __ATOMIC_SEQ_CST)
#define SWAP(i, value) __atomic_exchange_n(&pool[i], value, __ATOMIC_SEQ_CST)

static void take_parts(word *pool) {
  for (word w; w = ADD(WORD, 1), (w & 0xffff) < (w >> 16 & 0xffff); ADD(LEFT, -1))
    ((task)pool[TASK])((void **)pool[POINTERS], w & 0xffff);
}

#if WORKER
static void sleep(word *pool, word seen) {
  ADD(ASLEEP, 1);
  if (READ(WORD) >> 32 != seen)  // work came meanwhile: whoever brought it either has counted this thread or has not
    for (word n = READ(ASLEEP); n; )
      if (__atomic_compare_exchange_n(&pool[ASLEEP], &n, n - 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return;
  while (((int (*)(word, word))pool[WAIT])(pool[SEMAPHORE], ~0ul));  // again after a signal; a Mac asks for how long
}
void kernel(word *pool) {
  for (word seen = READ(WORD) >> 32;; take_parts(pool)) {
    for (int n = 0; READ(WORD) >> 32 == seen; n++) {
      if (n < 1000) PAUSE;
      else if (n < 1200) ((int (*)(void))pool[YIELD])();  // what else is to run here goes first
      else sleep(pool, seen), n = 0;
    }
    seen = READ(WORD) >> 32;
  }
}
#else
static void parallel(word *pool, task run, void **p, int parts) {
  if (parts == 1 || SWAP(BUSY, 1)) {
    for (int i = 0; i < parts; i++) run(p, i);
    return;
  }
  pool[TASK] = (word)run;
  pool[POINTERS] = (word)p;
  WRITE(LEFT, parts);
  WRITE(WORD, ((READ(WORD) >> 32) + 1) << 32 | parts << 16);
  for (word n = SWAP(ASLEEP, 0); n; n--) ((int (*)(word))pool[POST])(pool[SEMAPHORE]);
  take_parts(pool);
  for (int n = 0; READ(LEFT); n++)
    if (n < 10000) PAUSE;
    else ((int (*)(void))pool[YIELD])();
  WRITE(BUSY, 0);
}
#if ROWS_OF_KERNELS
// A row: a kernel, how many parts it has, which of its arguments tells the part, and MOST arguments.
#define A(i) a[i], a[i + 1], a[i + 2], a[i + 3], a[i + 4], a[i + 5], a[i + 6], a[i + 7]
#define WORDS(i) word, word, word, word, word, word, word, word
static void run(void **row, int core_id) {
  word a[MOST];
  for (int i = 0; i < MOST; i++) a[i] = (word)row[3 + i];
  if ((long)row[1] > 1) a[(long)row[2]] = core_id;
  ((void (*)(WORDS(0), WORDS(8), WORDS(16), WORDS(24)))row[0])(A(0), A(8), A(16), A(24));  // more than it takes
}
void kernel(word *rows, word *pool, word n) {
  for (word i = 0; i < n; i++, rows += 3 + MOST) parallel(pool, run, (void **)rows, rows[1]);
}
#else
static void run(void **p, int core_id) {
  share(GIVEN core_id);  // p[0], p[1], ..
}
void kernel(float *restrict out, ARGS word *pool) {
  void *p[] = {POINTERS_TO};
  parallel(pool, run, p, CORES);
}
#endif
#endif
