// What the planted faults build on. Each kernel is right with -DFAULT=0 and wrong with -DFAULT=1;
// "here: <kernel>" marks the line that the report must name.

struct bf16 {
    unsigned short bits;
};

#define BF16 1
#if FLOATX == BF16
typedef bf16 floatX;
#else
typedef float floatX;
#endif
