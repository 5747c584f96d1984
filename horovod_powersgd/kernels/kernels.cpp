// The three passes over a gradient on processors: plus memory and times a factor's basis; times the other one's; the
// product of both. They run at about the speed of memory, where a library's matrix product of so low a rank does not.
// And the basis of a small factor, and whether a few numbers are finite, of which the calls into a library take longer
// than what they do.
//
// Python passes addresses, so this needs no framework; torch_impl/kernels.py, orthogonalization.py and finite.py call
// it, and say what it computes.

#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

template <int N>
struct Number {
    static constexpr int value = N;
};

// delta (n, m) becomes delta + scale (previous - P Q^T) where there is a previous; P (s, n), Q (s, m). Or delta + scale
// halves, where there are halves: the upper 16 bits of floats.
// out (r, n) += basis (r, m) delta^T, or out (r, m) += basis (r, n) delta.
template <typename T>
struct HalfStep {
    T* delta;
    const T* previous;
    T scale;
    const T *p, *q;
    int64_t previous_rank;
    const T* basis;
    T* out;
    bool makes_q;
    int64_t rank, n, m;
    const uint16_t* halves;
};

// halves (n, m): the upper 16 bits of delta - P Q^T as floats, to which rows[i] + columns[j] was added below them.
// P (r, n), Q (r, m); there may be none.
template <typename T>
struct Keep {
    uint16_t* halves;
    const T *delta, *p, *q;
    const uint32_t *rows, *columns;
    int64_t rank, n, m;
};

// out (n, m) = from + sign P Q^T; P (r, n), Q (r, m).
template <typename T>
struct Product {
    T* out;
    const T* from;
    const T *p, *q;
    T sign;
    int64_t rank, n, m;
};

struct Part {
    long long row, row_end, column, column_end;
};

namespace any {
#define VECTOR_BYTES 16
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace any

// Clang knows neither the pragma nor how to put a lambda under an attribute; there any processor's kernels serve.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_AVX 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define VECTOR_BYTES 32
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx2,fma")
namespace avx512 {  // twice the registers, but not twice the width, at which many processors slow down
#define VECTOR_BYTES 32
#include "kernels.h"
#undef VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options
#endif

template <typename T>
struct Kernels {
    void (*half_step)(const HalfStep<T>&, const Part&) = any::half_step<T>;
    void (*product)(const Product<T>&, const Part&) = any::product<T>;
    void (*keep)(const Keep<T>&, const Part&) = any::keep<T>;

    Kernels() {
#ifdef HAS_AVX
        if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
            half_step = avx512::half_step<T>;
            product = avx512::product<T>;
            keep = avx512::keep<T>;
        } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            half_step = avx2::half_step<T>;
            product = avx2::product<T>;
            keep = avx2::keep<T>;
        }
#endif
    }
};

template <typename T>
const Kernels<T> kernels;

template <typename T>
T* at(unsigned long long address) {
    return reinterpret_cast<T*>(address);
}

typedef unsigned long long Address;

struct HalfStepTask {
    int is_double, makes_q;
    Address delta, previous, p, q, basis, out, halves;
    double scale;
    long long previous_rank, rank, n, m;
    Part part;

    bool read(PyObject* tuple) {
        return PyArg_ParseTuple(tuple, "pKKdKKLKKpLLLKLLLL", &is_double, &delta, &previous, &scale, &p, &q,
                                &previous_rank, &basis, &out, &makes_q, &rank, &n, &m, &halves, &part.row,
                                &part.row_end, &part.column, &part.column_end);
    }

    template <typename T>
    void run() const {
        kernels<T>.half_step({at<T>(delta), at<T>(previous), T(scale), at<T>(p), at<T>(q), previous_rank, at<T>(basis),
                              at<T>(out), makes_q != 0, rank, n, m, at<uint16_t>(halves)}, part);
    }
};

struct ProductTask {
    int is_double;
    Address out, from, p, q;
    double sign;
    long long rank, n, m;
    Part part;

    bool read(PyObject* tuple) {
        return PyArg_ParseTuple(tuple, "pKKKKdLLLLLLL", &is_double, &out, &from, &p, &q, &sign, &rank, &n, &m,
                                &part.row, &part.row_end, &part.column, &part.column_end);
    }

    template <typename T>
    void run() const {
        kernels<T>.product({at<T>(out), at<T>(from), at<T>(p), at<T>(q), T(sign), rank, n, m}, part);
    }
};

struct KeepTask {
    int is_double;
    Address halves, delta, p, q, rows, columns;
    long long rank, n, m;
    Part part;

    bool read(PyObject* tuple) {
        return PyArg_ParseTuple(tuple, "pKKKKKKLLLLLLL", &is_double, &halves, &delta, &p, &q, &rows, &columns, &rank, &n,
                                &m, &part.row, &part.row_end, &part.column, &part.column_end);
    }

    template <typename T>
    void run() const {
        kernels<T>.keep({at<uint16_t>(halves), at<T>(delta), at<T>(p), at<T>(q), at<uint32_t>(rows),
                         at<uint32_t>(columns), rank, n, m}, part);
    }
};

// Does what a list of tuples says, and lets Python's other threads run meanwhile.
template <typename Task>
PyObject* run_all(PyObject*, PyObject* list) {
    if (!PyList_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "a list of tuples is expected");
        return nullptr;
    }
    std::vector<Task> tasks(PyList_GET_SIZE(list));
    for (size_t i = 0; i < tasks.size(); i++)
        if (!tasks[i].read(PyList_GET_ITEM(list, i))) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    for (const auto& task : tasks) task.is_double ? task.template run<double>() : task.template run<float>();
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

// Whether no exponent is that of an infinity or a NaN.
template <typename Bits, Bits EXPONENT>
bool all_finite(const Bits* numbers, int64_t count) {
    Bits found = 0;
    for (int64_t i = 0; i < count; i++) found |= -Bits((numbers[i] & EXPONENT) == EXPONENT);
    return !found;
}

PyObject* finite(PyObject*, PyObject* arguments) {
    Address numbers;
    long long bytes, count;
    if (!PyArg_ParseTuple(arguments, "KLL", &numbers, &bytes, &count)) return nullptr;
    bool found = bytes == 8 ? all_finite<uint64_t, 0x7FF0000000000000>(at<uint64_t>(numbers), count)
                            : all_finite<uint32_t, 0x7F800000>(at<uint32_t>(numbers), count);
    return PyBool_FromLong(found);
}

// Two numbers of a row, in double precision.
typedef float Floats __attribute__((vector_size(8), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(16)));

inline Doubles two(const float* from) {
    return __builtin_convertvector(*reinterpret_cast<const Floats*>(from), Doubles);
}

double inner_product(const float* a, const float* b, int64_t n) {
    Doubles even{}, odd{};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        even += two(a + i) * two(b + i);
        odd += two(a + i + 2) * two(b + i + 2);
    }
    even += odd;
    double sum = even[0] + even[1];
    for (; i < n; i++) sum += double(a[i]) * b[i];
    return sum;
}

// Makes the rows of a factor (rank, n) orthonormal, by the Cholesky factor L of its Gram matrix: out (rank, n) is
// L^-1 factor. Returns the least part of a row that is its own, next to the longest row: 0 or a rounding where a row
// depends on those before it, and 0 where a number is not finite; out is of no use then.
double small_basis(const float* factor, float* out, int64_t rank, int64_t n) {
    std::vector<double> triangle(rank * rank), inverse(rank * rank);
    double longest = 0, least = INFINITY;
    for (int64_t i = 0; i < rank; i++) {
        double* row = &triangle[i * rank];
        for (int64_t j = 0; j <= i; j++) row[j] = inner_product(factor + i * n, factor + j * n, n);
        longest = std::max(longest, row[i]);
        for (int64_t j = 0; j <= i; j++) {
            const double* other = &triangle[j * rank];
            for (int64_t k = 0; k < j; k++) row[j] -= row[k] * other[k];
            if (j < i) row[j] /= other[j];
        }
        if (!(row[i] > 0 && row[i] < INFINITY)) return 0;
        row[i] = std::sqrt(row[i]);
        least = std::min(least, row[i]);
    }
    for (int64_t i = 0; i < rank; i++) {
        const double* row = &triangle[i * rank];
        for (int64_t j = 0; j <= i; j++) {
            double sum = i == j;
            for (int64_t k = j; k < i; k++) sum -= row[k] * inverse[k * rank + j];
            inverse[i * rank + j] = sum / row[i];
        }
    }
    for (int64_t i = 0; i < rank; i++) {
        const double* coefficients = &inverse[i * rank];
        int64_t column = 0;
        for (; column + 2 <= n; column += 2) {
            Doubles sums{};
            for (int64_t k = 0; k <= i; k++) sums += coefficients[k] * two(factor + k * n + column);
            *reinterpret_cast<Floats*>(out + i * n + column) = __builtin_convertvector(sums, Floats);
        }
        for (; column < n; column++) {
            double sum = 0;
            for (int64_t k = 0; k <= i; k++) sum += coefficients[k] * factor[k * n + column];
            out[i * n + column] = float(sum);
        }
    }
    return least / std::sqrt(longest);
}

PyObject* basis(PyObject*, PyObject* arguments) {
    Address factor, out;
    long long rank, n;
    if (!PyArg_ParseTuple(arguments, "KKLL", &factor, &out, &rank, &n)) return nullptr;
    return PyFloat_FromDouble(small_basis(at<float>(factor), at<float>(out), rank, n));
}

PyMethodDef methods[] = {{"half_steps", run_all<HalfStepTask>, METH_O, nullptr},
                         {"products", run_all<ProductTask>, METH_O, nullptr},
                         {"keep", run_all<KeepTask>, METH_O, nullptr},
                         {"basis", basis, METH_VARARGS, nullptr},
                         {"finite", finite, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&module); }
