/* The C interface of sparsify: packed sparse weights, the kernels that multiply with them, and the checkpoints that
 * hold them. Plain C, without torch and Python; docs/deploy.md shows programs. Every exported function is declared
 * here.
 *
 * Words. A *form* is how a sparse weight (out x in) lies in memory for one family of kernels. In every form a packed
 * weight is two plain arrays: `index` (bytes: header, columns, masks, pointers; no values, position independent) and
 * `values` (float32, bfloat16, float16 or int8, in the order the kernels read them, padding allowed). The way in and
 * out is CSR with int32 row pointers `crow` (out + 1) and int32 columns `col`, strictly increasing within a row. A
 * stored value of zero is a kept weight like any other.
 *
 * Threads. Any function may be called from several threads at once, except where it says otherwise. A call computes on
 * at most the threads that it is told to.
 *
 * Return values: sizes are >= 0, status is SPARSIFY_OK (0); errors are negative and listed below.
 */
#ifndef SPARSIFY_H
#define SPARSIFY_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef _WIN32
#define SPARSIFY_API __declspec(dllexport)
#else
#define SPARSIFY_API __attribute__((visibility("default")))
#endif

enum sparsify_status {
    SPARSIFY_OK = 0,
    SPARSIFY_FOUND = 1,      /* of sparsify_hides_values */
    SPARSIFY_BAD_CSR = -1,   /* row pointers or columns out of range or out of order */
    SPARSIFY_BAD_INDEX = -2, /* an index that pack did not write: wrong form, size, bounds or order */
    SPARSIFY_BAD_ARGUMENT = -3,
    SPARSIFY_NO_MEMORY = -4,
    SPARSIFY_UNKNOWN_KERNEL = -5,
    SPARSIFY_UNSUPPORTED_KERNEL = -6, /* known, but not on this processor */
    SPARSIFY_UNKNOWN_THREADS = -7,    /* SPARSIFY_THREADS names no team of this library */
    SPARSIFY_BAD_FILE = -8,           /* no checkpoint, or a damaged one */
    SPARSIFY_NOT_FOUND = -9,          /* no layer or tensor of that name */
};

enum sparsify_activation {
    SPARSIFY_NONE = 0,
    SPARSIFY_RELU = 1,
    SPARSIFY_GELU_ERF = 2,
    SPARSIFY_GELU_TANH = 3,
    SPARSIFY_SILU = 4,
    SPARSIFY_HARDSWISH = 5,
    SPARSIFY_RELU6 = 6,
};

/* The version of the release, that of the Python package. */
#define SPARSIFY_VERSION "0.1.0"
SPARSIFY_API const char *sparsify_version(void);
/* The number of this interface: whoever loads the library at run time compares it first, since a library built from
 * other sources may take other arguments. Raised with every change of a declaration below. */
#define SPARSIFY_INTERFACE 10
SPARSIFY_API int sparsify_interface(void);
/* A status in words, for messages. */
SPARSIFY_API const char *sparsify_status_text(int status);

/* ---- instruction sets ------------------------------------------------------------------------------------------ */

/* Names of the kernel tables built into this library, best first, separated by spaces: "avx512 avx2 portable". */
SPARSIFY_API const char *sparsify_known_kernels(void);
/* The table in use. Chosen at the first call of anything: SPARSIFY_KERNEL if set and usable, else the best here. */
SPARSIFY_API const char *sparsify_kernel(void);
/* Choose a table by name; NULL or "" goes back to the best. Not to be called while another thread computes. */
SPARSIFY_API int sparsify_set_kernel(const char *name);
/* How the environment variable SPARSIFY_KERNEL was understood: OK, UNKNOWN_KERNEL or UNSUPPORTED_KERNEL. */
SPARSIFY_API int sparsify_kernel_status(void);
/* The table whose code a table runs for a form, with int8 values if quantized is not 0: a set of instructions that adds
 * a few kernels to another takes the rest from there. The name itself if the table does not run on this processor; NULL
 * for an unknown name or form. */
SPARSIFY_API const char *sparsify_kernel_origin(const char *name, int form, int quantized);

/* ---- threads ---------------------------------------------------------------------------------------------------- */

/* Who runs a call's tasks beside its caller: "openmp", threads of the OpenMP runtime that torch uses too, where the
 * library was built with it; "pool", threads of its own; or "serial", nobody. The first of them, or the one that the
 * environment variable SPARSIFY_THREADS names at the first call; "" for any other name, and calls that have tasks then
 * return SPARSIFY_UNKNOWN_THREADS. */
SPARSIFY_API const char *sparsify_threads(void);

/* A call that waited long for one of its threads, whose core another process held, makes the next ones use one thread
 * until that core is free. Whoever measures calls this first, so that what was before does not matter. */
SPARSIFY_API void sparsify_forget_stalls(void);

/* ---- forms ------------------------------------------------------------------------------------------------------
 * For each FORM:
 *   index_bytes, n_values   sizes that pack will write
 *   pack                    order[i] = CSR position of packed value i, or -1 for padding
 *   unpack                  the inverse; order as above, crow has out + 1 entries, col one per kept weight
 *   nnz                     kept weights of a checked index, so that a caller can size col for unpack
 *   check                   SPARSIFY_OK only if no kernel or unpack can read or write out of bounds with this index
 */
#define SPARSIFY_DECLARE_FORM(FORM)                                                                                    \
    SPARSIFY_API int64_t sparsify_##FORM##_index_bytes(int64_t out, int64_t in, const int32_t *crow,                   \
                                                       const int32_t *col);                                            \
    SPARSIFY_API int64_t sparsify_##FORM##_n_values(int64_t out, int64_t in, const int32_t *crow, const int32_t *col); \
    SPARSIFY_API int sparsify_##FORM##_pack(int64_t out, int64_t in, const int32_t *crow, const int32_t *col,          \
                                            uint8_t *index, int64_t *order);                                           \
    SPARSIFY_API int sparsify_##FORM##_check(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes,       \
                                             int64_t n_values);                                                        \
    SPARSIFY_API int64_t sparsify_##FORM##_nnz(const uint8_t *index);                                                  \
    SPARSIFY_API int sparsify_##FORM##_unpack(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes,      \
                                              int64_t n_values, int32_t *crow, int32_t *col, int64_t *order);

SPARSIFY_DECLARE_FORM(panel)
SPARSIFY_DECLARE_FORM(bitmask)
SPARSIFY_DECLARE_FORM(gather)
SPARSIFY_DECLARE_FORM(quads)
SPARSIFY_DECLARE_FORM(quadmask)
SPARSIFY_DECLARE_FORM(quadsteps)
SPARSIFY_DECLARE_FORM(pairmask)
SPARSIFY_DECLARE_FORM(sell)
SPARSIFY_DECLARE_FORM(widesteps)

/* The values of the first three and of sell are of the dtype of x, or int8. Quads, quadmask, quadsteps and widesteps
 * quantise x, and their values are int8. Those of pairmask are bfloat16, as x. */
enum sparsify_form {
    SPARSIFY_PANEL = 0,
    SPARSIFY_BITMASK = 1,
    SPARSIFY_GATHER = 2,
    SPARSIFY_QUADS = 3,
    SPARSIFY_QUADMASK = 4,
    SPARSIFY_QUADSTEPS = 5,
    SPARSIFY_PAIRMASK = 6,
    SPARSIFY_SELL = 7,
    SPARSIFY_WIDESTEPS = 8,
    SPARSIFY_N_FORMS = 9,
};
/* The functions above of a form by its number, and its name; NULL for any other number. */
struct sparsify_form_functions {
    const char *name;
    int quantizes_inputs; /* not 0: rows of x are quantised, and the int8 values end with the sums of the rows */
    int64_t (*index_bytes)(int64_t out, int64_t in, const int32_t *crow, const int32_t *col);
    int64_t (*n_values)(int64_t out, int64_t in, const int32_t *crow, const int32_t *col);
    int (*pack)(int64_t out, int64_t in, const int32_t *crow, const int32_t *col, uint8_t *index, int64_t *order);
    int (*check)(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values);
    int64_t (*nnz)(const uint8_t *index);
    int (*unpack)(int64_t out, int64_t in, const uint8_t *index, int64_t index_bytes, int64_t n_values, int32_t *crow,
                  int32_t *col, int64_t *order);
};
SPARSIFY_API const struct sparsify_form_functions *sparsify_form(int form);

enum sparsify_dtype { SPARSIFY_F32 = 0, SPARSIFY_BF16 = 1, SPARSIFY_F16 = 2, SPARSIFY_N_DTYPES = 3 };

/* y[t, o - first_row] = activation(sum over kept k of x[t, k] * w[o, k] + bias[o]) for first_row <= o < end_row,
 * rounded once to the dtype of all four arrays. Strides count elements between the rows of tokens; within a row
 * elements are neighbours. y overlaps no input. Every field takes 8 bytes: ctypes converts one argument in 0.4 us and
 * twelve in 2.4.
 */
struct sparsify_linear_call {
    const uint8_t *index;
    const void *values;
    const void *bias; /* may be NULL */
    const void *x;
    int64_t x_stride;
    void *y;
    int64_t y_stride;
    int64_t tokens, out, in;
    int64_t activation; /* enum sparsify_activation */
    int64_t n_threads;  /* at most so many; 1: do not start threads */
    int64_t first_row, end_row;
};

SPARSIFY_API int sparsify_linear(int form, int dtype, const struct sparsify_linear_call *call);

/* The same with int8 values: w[o, k] = values * scale[o], where scale is float32 (out). dtype is that of x, y and bias.
 * Forms that quantise no x multiply it as it is, and the sum by scale[o]. The others quantise each row of x to 0..255
 * first and sum up exactly, so that every instruction set gives the same bits before the activation:
 *
 *   lo = min(0, min x), hi = max(0, max x), step = (hi - lo) / 255, zero = rint(-lo / step) in 0..255
 *   q[k] = rint(x[k] / step) + zero, kept in 0..255; a step of 0 makes q and zero 0
 *   y[o] = activation(float(sum of q[k] * values[o, k] - zero * sum of values[o, k]) * (step * scale[o]) + bias[o])
 *
 * in float32, each operation rounded once, 1 / step being 255 / (hi - lo). Inf or NaN in a row of x makes NaN of its
 * outputs. The last 4 * out bytes of such values are the sums of values[o, k] over k, int32; pack leaves them to the
 * caller (order -1). in is at most SPARSIFY_MOST_QUANTIZED_IN, so that no sum overflows.
 */
#define SPARSIFY_MOST_QUANTIZED_IN 65536
struct sparsify_int8_call {
    struct sparsify_linear_call linear;
    const float *scale;
};

SPARSIFY_API int sparsify_linear_int8(int form, int dtype, const struct sparsify_int8_call *call);

/* The same for images whose features lie in planes, channels first: x[image][k][t] and y[image][o - first_row][t].
 * `image` says how one of them is laid out: its tokens are neighbours, and its strides count elements between planes.
 * The form is panel.
 */
struct sparsify_pointwise_call {
    struct sparsify_linear_call image;
    int64_t n_images, x_image_stride, y_image_stride;
};

SPARSIFY_API int sparsify_pointwise(int dtype, const struct sparsify_pointwise_call *call);

/* Two linear layers, each with its activation, of which the second reads what the first writes: as two calls of
 * sparsify_linear, bit for bit, or of sparsify_linear_int8 where both have a scale. The form of both is panel, or
 * quantises x. Neither y of the first nor x of the second is used; each has all of its rows. Faster than two calls from
 * some 64 tokens a thread on.
 */
struct sparsify_mlp_call {
    struct sparsify_linear_call first, second;
    const float *first_scale, *second_scale; /* both NULL, or none */
};

SPARSIFY_API int sparsify_mlp(int form, int dtype, const struct sparsify_mlp_call *call);

/* A convolution of images x (n_images, channels, height, width) without groups: the weight, in the form panel, is
 * (out, channels * kernel_height * kernel_width), its columns in this order. Output row i, column j is at row
 * i * stride_height - top, column j * stride_width - left of the image, the first position of the kernel; positions
 * outside of the image count as zeros, before it and, as far as out_height and out_width reach, behind it. The sum for
 * an output o is multiplied by scale[o], then the bias is added, the BatchNorm applied and the residual added, in this
 * order, before the activation. Strides of x count elements; either columns or channels are neighbours. y and the
 * residual have no gaps: (n_images, out, out_height, out_width), or with y_channels_last (n_images, out_height,
 * out_width, out). A call has a scale or a BatchNorm, not both.
 */
struct sparsify_convolution_call {
    const uint8_t *index;
    const void *values;
    const float *scale;   /* may be NULL, for ones */
    const void *bias;     /* may be NULL */
    const void *residual; /* may be NULL */
    /* A BatchNorm, for float32 only: none if norm_variance is NULL; weight and bias may be NULL for ones and zeros. */
    const float *norm_mean, *norm_variance, *norm_weight, *norm_bias;
    double norm_eps;
    const void *x;
    int64_t x_image_stride, x_channel_stride, x_row_stride, x_column_stride;
    void *y;
    int64_t y_channels_last;
    int64_t n_images, channels, height, width;
    int64_t out, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_height, stride_width;
    int64_t top, left, dilation_height, dilation_width;
    int64_t activation, n_threads;
};

SPARSIFY_API int sparsify_convolution(int dtype, const struct sparsify_convolution_call *call);

/* A depthwise convolution: y[:, c] is x[:, c] convolved with a dense kernel of its own, values[c][kernel height][kernel
 * width], of the dtype; index is not read. The call is that of sparsify_convolution, with out == channels and neither
 * scale nor residual. */
SPARSIFY_API int sparsify_depthwise(int dtype, const struct sparsify_convolution_call *call);

/* ---- gradient of the kept weights --------------------------------------------------------------------------------
 * y[o, k] = sum over tokens of grad[t, o] * x[t, k] for every kept (o, k) of a CSR matrix that pack has accepted, in
 * float32; all else of y, (out, in) without gaps, stays. workspace has SPARSIFY_SDDMM_TOKENS * (in + out) floats. */
#define SPARSIFY_SDDMM_TOKENS 256
struct sparsify_sddmm_call {
    const void *grad;
    int64_t grad_stride;
    const void *x;
    int64_t x_stride;
    const int32_t *crow, *col;
    void *y;
    void *workspace;
    int64_t tokens, out, in;
    int64_t n_threads;
};

SPARSIFY_API int sparsify_sddmm(const struct sparsify_sddmm_call *call);

/* ---- masked weights ----------------------------------------------------------------------------------------------
 * Sets values[i] to zero (all bits) where mask[i] is 0, for n values of 2, 4 or 8 bytes; where it is 1 nothing changes.
 */
SPARSIFY_API int sparsify_clear_masked(void *values, const uint8_t *mask, int64_t n, int value_bytes, int n_threads);
/* Returns SPARSIFY_FOUND if sparsify_clear_masked would change a bit; nothing is written. */
SPARSIFY_API int sparsify_hides_values(void *values, const uint8_t *mask, int64_t n, int value_bytes, int n_threads);

/* ---- factors of parts of a matrix --------------------------------------------------------------------------------
 * For each of n_parts lists of `size` rows, order[part][size], the lower Cholesky factor of those rows and columns of a
 * symmetric float32 matrix (n, n): lower[part][size][size], zero above the diagonal. The last row of the matrix is not
 * read: it stands for one of the identity. Where a part is not positive definite, its factor holds NaN. */
struct sparsify_factor_call {
    const float *matrix;
    const int64_t *order;
    float *lower;
    int64_t n, n_parts, size;
    int64_t n_threads;
};

SPARSIFY_API int sparsify_factor_parts(const struct sparsify_factor_call *call);

/* ---- roofs ------------------------------------------------------------------------------------------------------
 * What the machine can do at most with the instruction set in use, measured for `seconds` on n_threads threads at once;
 * negative on error. For benchmarks: not to be called after fork. A read goes over `bytes` bytes again and again, each
 * thread over its own part: well beyond the last-level cache it is the bandwidth of memory.
 */
SPARSIFY_API double sparsify_measure_fma_gflops(double seconds, int n_threads);
SPARSIFY_API double sparsify_measure_read_gbs(double seconds, int n_threads, int64_t bytes);

/* ---- checkpoints -------------------------------------------------------------------------------------------------
 * A file written by sparsify.save (docs/formats.md), read into memory whole. Opening checks everything that the file
 * alone can tell: that it is a whole safetensors file, every hash, the header, and the tensors of each layer, so that
 * what follows neither reads nor writes out of bounds. Stricter than Python: a JSON key that stands twice, and a zero
 * byte in a name, are refused. A checkpoint may be read from several threads. Pointers given out belong to it.
 */
struct sparsify_checkpoint;

/* Returns NULL for anything but a checkpoint; `message` (`message_bytes` long, may be NULL) then has the reason, and
 * `status` (may be NULL) SPARSIFY_BAD_FILE or SPARSIFY_NO_MEMORY. */
SPARSIFY_API struct sparsify_checkpoint *sparsify_checkpoint_open(const char *path, char *message,
                                                                  int64_t message_bytes, int *status);
SPARSIFY_API void sparsify_checkpoint_close(struct sparsify_checkpoint *checkpoint);

/* Layers have the numbers from 0 on in the order of the header, tensors in an order of their own. The second pair
 * returns the number of a name, or SPARSIFY_NOT_FOUND; tensors are found by the names of tied ones too. */
SPARSIFY_API int64_t sparsify_checkpoint_n_layers(const struct sparsify_checkpoint *checkpoint);
SPARSIFY_API int64_t sparsify_checkpoint_n_tensors(const struct sparsify_checkpoint *checkpoint);
SPARSIFY_API int64_t sparsify_checkpoint_find_layer(const struct sparsify_checkpoint *checkpoint, const char *name);
SPARSIFY_API int64_t sparsify_checkpoint_find_tensor(const struct sparsify_checkpoint *checkpoint, const char *name);

/* An entry of `layers`: a packed weight (out x in). Texts are those of the header, UTF-8. */
struct sparsify_stored_layer {
    const char *name;        /* "" for the root of the model; its bias is the tensor NAME.bias */
    const char *module;      /* "CSRLinear", "SparseLinear", "Linear", "Embedding" */
    const char *format;      /* "csr", "bitmask", "dense" */
    const char *dtype;       /* of the values: "F32", "BF16", "F16", "F64", "I8" ... */
    const char *dequantized; /* the dtype of the weight that int8 values stand for; "" if the values are the weight */
    const char *form;        /* the form that `export` chose, "dense" among them; "" if the file has no choice */
    int64_t out, in, n_kept;
    const float *scale; /* (out), of int8 values; else NULL */
};
SPARSIFY_API int sparsify_checkpoint_layer(const struct sparsify_checkpoint *checkpoint, int64_t number,
                                           struct sparsify_stored_layer *layer);

/* The kept weights of a layer as CSR: crow (out + 1), col (n_kept) and values (n_kept, of the layer's dtype). */
SPARSIFY_API int sparsify_checkpoint_csr(const struct sparsify_checkpoint *checkpoint, int64_t number, int32_t *crow,
                                         int32_t *col, void *values);

/* A tensor of the file: biases, embeddings, norms, and the parts of packed weights. */
struct sparsify_stored_tensor {
    const char *name;
    const char *dtype; /* "F32" ... */
    int64_t n_dims;
    const int64_t *sizes;
    const void *data; /* row after row, at a multiple of 64 bytes */
    int64_t bytes;
};
SPARSIFY_API int sparsify_checkpoint_tensor(const struct sparsify_checkpoint *checkpoint, int64_t number,
                                            struct sparsify_stored_tensor *tensor);

/* ---- other runtimes ----------------------------------------------------------------------------------------------
 * ONNX Runtime, 1.17 or newer, calls this function of a library of custom operators: an OrtSessionOptions * and a const
 * OrtApiBase *; returns an OrtStatus *. The operators are those that sparsify.export_onnx writes, of the domain
 * "sparsify". */
SPARSIFY_API void *RegisterCustomOps(void *options, const void *api_base);

/* Registers the operators of exported layers with the torch of this process, 2.10 or newer: for a program that loads a
 * package of AOTInductor. Not beside `import sparsify`, which registers them itself. Returns SPARSIFY_NOT_FOUND if
 * libtorch is not loaded, SPARSIFY_BAD_ARGUMENT if torch refuses: a second call, or operators of another library. */
SPARSIFY_API int sparsify_register_torch(void);

#ifdef __cplusplus
}
#endif
#endif
