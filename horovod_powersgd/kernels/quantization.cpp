// Numbers to codes of 8 bits, and back. horovod_powersgd/quantization.py says what they are; torch_impl's
// quantization.py calls this.
//
// Compiled so that products and sums are not rounded together (-ffp-contract=off): all workers are to come to the same
// bits, whatever their processors have.

#include <Python.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// Where the C library can choose between functions when they are loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace {

// The bits of a number without its sign are in the order of its size; those of what is not finite come last.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <typename T>
FOR_EACH_PROCESSOR Bits<T> largest_bits(const T* numbers, int64_t count) {
    Bits<T> largest = 0;
    for (int64_t i = 0; i < count; i++) {
        Bits<T> bits;
        std::memcpy(&bits, numbers + i, sizeof bits);
        bits &= std::numeric_limits<Bits<T>>::max();
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// Added and taken away again, it rounds to the nearest integer, the even one of two: at its size, neighbouring numbers
// differ by 1.
template <typename T>
constexpr T ROUNDS = T(3ll << (std::numeric_limits<T>::digits - 2));

template <typename T>
FOR_EACH_PROCESSOR void divide(const T* numbers, int64_t count, T unit, int8_t* codes) {
    for (int64_t i = 0; i < count; i++)
        codes[i] = static_cast<int8_t>(static_cast<int32_t>((numbers[i] / unit + ROUNDS<T>) - ROUNDS<T>));
}

template <typename T>
FOR_EACH_PROCESSOR void multiply(const int8_t* codes, int64_t count, T unit, T* out) {
    for (int64_t i = 0; i < count; i++) out[i] = codes[i] * unit;
}

template <typename T>
FOR_EACH_PROCESSOR void multiply_add(const int8_t* codes, int64_t count, T unit, T* out) {
    for (int64_t i = 0; i < count; i++) out[i] += codes[i] * unit;
}

// Slices in a row, and their messages: for each slice the segments' units, then the codes.
struct Slices {
    const int64_t* segments;  // (count, width): their lengths
    int64_t width, count, size;
};

template <typename T>
void encode(const T* numbers, int64_t total, const Slices& slices, uint8_t* message, int64_t distance) {
    for (int64_t slice = 0; slice < slices.count; slice++, message += distance) {
        int8_t* codes = reinterpret_cast<int8_t*>(message + slices.width * sizeof(T));
        std::memset(codes, 0, slices.size);
        int64_t place = 0;
        for (int64_t k = 0; k < slices.width; k++) {
            const int64_t length = slices.segments[slice * slices.width + k], first = slice * slices.size + place;
            const int64_t there = first + length < total ? length : first < total ? total - first : 0;
            const auto bits = largest_bits(numbers + first, there);
            T largest;
            std::memcpy(&largest, &bits, sizeof largest);
            const bool finite = largest <= std::numeric_limits<T>::max();
            const T unit = finite ? largest / 127 : std::numeric_limits<T>::quiet_NaN();
            if (unit >= std::numeric_limits<T>::min()) divide(numbers + first, there, unit, codes + place);
            std::memcpy(message + k * sizeof(T), &unit, sizeof unit);
            place += length;
        }
    }
}

template <typename T>
void decode(const uint8_t* message, int64_t distance, const Slices& slices, T divisor, T* out, bool adds) {
    for (int64_t slice = 0; slice < slices.count; slice++, message += distance) {
        const int8_t* codes = reinterpret_cast<const int8_t*>(message + slices.width * sizeof(T));
        for (int64_t k = 0; k < slices.width; k++) {
            const int64_t length = slices.segments[slice * slices.width + k];
            T unit;
            std::memcpy(&unit, message + k * sizeof(T), sizeof unit);
            (adds ? multiply_add<T> : multiply<T>)(codes, length, unit / divisor, out);
            codes += length;
            out += length;
        }
    }
}

template <typename T>
T* at(unsigned long long address) {
    return reinterpret_cast<T*>(address);
}

PyObject* encode(PyObject*, PyObject* arguments) {
    int is_double;
    unsigned long long numbers, segments, message;
    long long total, width, count, size, distance;
    if (!PyArg_ParseTuple(arguments, "pKLKLLLKL", &is_double, &numbers, &total, &segments, &width, &count, &size,
                          &message, &distance))
        return nullptr;
    Py_BEGIN_ALLOW_THREADS
    const Slices slices{at<int64_t>(segments), width, count, size};
    if (is_double) encode(at<double>(numbers), total, slices, at<uint8_t>(message), distance);
    else encode(at<float>(numbers), total, slices, at<uint8_t>(message), distance);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* decode(PyObject*, PyObject* arguments) {
    int is_double, adds;
    unsigned long long message, segments, out;
    long long distance, width, count, size, divisor;
    if (!PyArg_ParseTuple(arguments, "pKLKLLLLKp", &is_double, &message, &distance, &segments, &width, &count, &size,
                          &divisor, &out, &adds))
        return nullptr;
    Py_BEGIN_ALLOW_THREADS
    const Slices slices{at<int64_t>(segments), width, count, size};
    if (is_double) decode<double>(at<uint8_t>(message), distance, slices, divisor, at<double>(out), adds);
    else decode<float>(at<uint8_t>(message), distance, slices, divisor, at<float>(out), adds);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"encode", encode, METH_VARARGS, nullptr},
                         {"decode", decode, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_quantization", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__quantization() { return PyModule_Create(&module); }
