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

template <typename T>
FOR_EACH_PROCESSOR void multiply_subtract(const int8_t* codes, int64_t count, T unit, T* out) {
    for (int64_t i = 0; i < count; i++) out[i] -= codes[i] * unit;
}

template <typename T>
FOR_EACH_PROCESSOR void add(const T* numbers, int64_t count, T scale, T* out) {
    for (int64_t i = 0; i < count; i++) out[i] += numbers[i] * scale;
}

template <typename T>
FOR_EACH_PROCESSOR double sum_of_squares(const T* numbers, int64_t count) {
    constexpr int LANES = 8;
    double sums[LANES] = {}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) sums[lane] += double(numbers[i + lane]) * numbers[i + lane];
    for (; i < count; i++) sum += double(numbers[i]) * numbers[i];
    for (double some : sums) sum += some;
    return sum;
}

// Some segments in a row, those of a slice after those of the slice before; and their places in messages, which have
// for each slice the units, and then the codes.
struct Segments {
    const int64_t* lengths;  // (slices, width)
    int64_t width, first, last;
    int64_t place;     // where the first one begins in its slice
    int64_t distance;  // from a slice's message to the next one's, in bytes

    // Calls f(length, its unit's place, its codes' place) for each of them; places count from the first one's slice's
    // message.
    template <typename T, typename F>
    void for_each(F f) const {
        int64_t here = place;
        for (int64_t i = first; i < last; i++) {
            const int64_t message = (i / width - first / width) * distance, column = i % width;
            if (column == 0) here = 0;
            f(lengths[i], message + column * int64_t(sizeof(T)), message + width * int64_t(sizeof(T)) + here);
            here += lengths[i];
        }
    }
};

// Numbers that are missing at the end are zeros. Where they leave, what the codes do not say is left in their place;
// the sum of their squares before is returned then.
template <typename T>
double encode(T* numbers, int64_t total, const T* memory, T scale, bool leaves, const Segments& segments,
              uint8_t* messages) {
    double squares = 0;
    segments.for_each<T>([&](int64_t length, int64_t unit_place, int64_t codes_place) {
        const int64_t count = length < total ? length : total;
        if (memory) add(memory, count, scale, numbers);
        const auto bits = largest_bits(numbers, count);
        T largest;
        std::memcpy(&largest, &bits, sizeof largest);
        const bool finite = largest <= std::numeric_limits<T>::max();
        const T unit = finite ? largest / 127 : std::numeric_limits<T>::quiet_NaN();
        int8_t* codes = reinterpret_cast<int8_t*>(messages + codes_place);
        const int64_t coded = unit >= std::numeric_limits<T>::min() ? count : 0;
        divide(numbers, coded, unit, codes);
        std::memset(codes + coded, 0, length - coded);
        std::memcpy(messages + unit_place, &unit, sizeof unit);
        if (leaves) {
            squares += sum_of_squares(numbers, count);
            multiply_subtract(codes, count, unit, numbers);
        }
        numbers += count;
        total -= count;
        if (memory) memory += count;
    });
    return squares;
}

// The sum of what all senders' messages say, in their order.
template <typename T>
void decode(const uint8_t* messages, int64_t senders, int64_t between, const Segments& segments, T divisor, T* out,
            int64_t total) {
    segments.for_each<T>([&](int64_t length, int64_t unit_place, int64_t codes_place) {
        const int64_t count = length < total ? length : total;
        for (int64_t sender = 0; sender < senders; sender++) {
            const uint8_t* message = messages + sender * between;
            T unit;
            std::memcpy(&unit, message + unit_place, sizeof unit);
            const int8_t* codes = reinterpret_cast<const int8_t*>(message + codes_place);
            (sender ? multiply_add<T> : multiply<T>)(codes, count, unit / divisor, out);
        }
        out += count;
        total -= count;
    });
}

template <typename T>
T* at(unsigned long long address) {
    return reinterpret_cast<T*>(address);
}

PyObject* encode(PyObject*, PyObject* arguments) {
    int is_double, leaves;
    unsigned long long numbers, memory, lengths, messages;
    long long total, width, first, last, place, distance;
    double scale, squares;
    if (!PyArg_ParseTuple(arguments, "pKLKdpKLLLLLK", &is_double, &numbers, &total, &memory, &scale, &leaves, &lengths,
                          &width, &first, &last, &place, &distance, &messages))
        return nullptr;
    Py_BEGIN_ALLOW_THREADS
    const Segments segments{at<int64_t>(lengths), width, first, last, place, distance};
    uint8_t* to = at<uint8_t>(messages);
    squares = is_double ? encode<double>(at<double>(numbers), total, at<double>(memory), scale, leaves, segments, to)
                        : encode<float>(at<float>(numbers), total, at<float>(memory), scale, leaves, segments, to);
    Py_END_ALLOW_THREADS
    return PyFloat_FromDouble(squares);
}

PyObject* decode(PyObject*, PyObject* arguments) {
    int is_double;
    unsigned long long messages, lengths, out;
    long long senders, between, width, first, last, place, distance, divisor, total;
    if (!PyArg_ParseTuple(arguments, "pKLLKLLLLLLKL", &is_double, &messages, &senders, &between, &lengths, &width,
                          &first, &last, &place, &distance, &divisor, &out, &total))
        return nullptr;
    Py_BEGIN_ALLOW_THREADS
    const Segments segments{at<int64_t>(lengths), width, first, last, place, distance};
    const uint8_t* from = at<uint8_t>(messages);
    if (is_double) decode<double>(from, senders, between, segments, divisor, at<double>(out), total);
    else decode<float>(from, senders, between, segments, divisor, at<float>(out), total);
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
