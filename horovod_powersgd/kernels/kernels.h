// The kernels for one instruction set. Included once for each of them, in a namespace of its own, with VECTOR_BYTES
// set.
//
// Rows of factors are as long as the matrix has rows (P) or columns (Q): factors are kept transposed.

template <typename T>
struct Simd {
    typedef T Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
    static constexpr int64_t lanes = VECTOR_BYTES / sizeof(T);
};

template <typename T>
static inline typename Simd<T>::Vector load(const T* from) {
    return *reinterpret_cast<const typename Simd<T>::Vector*>(from);
}

template <typename T>
static inline void store(T* to, typename Simd<T>::Vector vector) {
    *reinterpret_cast<typename Simd<T>::Vector*>(to) = vector;
}

// Columns that are worked on together: four rows of them and of each factor stay in the first level of the cache.
static constexpr int64_t TILE = 1024;

// Some rows of a matrix, by the address of the first one's first element; distance: from row to row, in elements.
template <typename T>
struct Rows {
    T* first;
    int64_t distance;
};

// to = from + sign P Q^T, or gradient + scale (from + sign P Q^T). Without FROM, from is zero.
//
// What there is, is a matter of the template: with branches inside, products and sums could be rounded together in one
// place and apart in the other, and looking at a memory would change the last bits of what follows.
template <typename T, int ROWS, int RANK, bool FROM, bool GRADIENT>
static void add_product(Rows<T> to, Rows<const T> from, const T* gradient, T scale, Rows<const T> p, Rows<const T> q,
                        T sign, int64_t columns) {
    T coefficients[RANK][ROWS];
    for (int k = 0; k < RANK; k++)
        for (int i = 0; i < ROWS; i++) coefficients[k][i] = sign * p.first[k * p.distance + i];
    int64_t j = 0;
    for (; j + Simd<T>::lanes <= columns; j += Simd<T>::lanes) {
        typename Simd<T>::Vector sums[ROWS];
        for (int i = 0; i < ROWS; i++) {
            if constexpr (FROM) sums[i] = load(from.first + i * from.distance + j);
            else sums[i] = typename Simd<T>::Vector{};
        }
        for (int k = 0; k < RANK; k++) {
            const auto factor = load(q.first + k * q.distance + j);
            for (int i = 0; i < ROWS; i++) sums[i] += coefficients[k][i] * factor;
        }
        for (int i = 0; i < ROWS; i++) {
            const int64_t place = i * to.distance + j;
            if constexpr (GRADIENT) sums[i] = load(gradient + place) + scale * sums[i];
            store(to.first + place, sums[i]);
        }
    }
    for (; j < columns; j++)
        for (int i = 0; i < ROWS; i++) {
            T sum = 0;
            if constexpr (FROM) sum = from.first[i * from.distance + j];
            for (int k = 0; k < RANK; k++) sum += coefficients[k][i] * q.first[k * q.distance + j];
            const int64_t place = i * to.distance + j;
            if constexpr (GRADIENT) sum = gradient[place] + scale * sum;
            to.first[place] = sum;
        }
}

// What is worked on after this: it is fetched while there is arithmetic to be done, or memory and arithmetic would wait
// for each other in turn.
template <typename T>
struct Next {
    const T *delta, *previous;
    int64_t distance;

    // Of two vectors in a line of the cache, the first fetches the one, and the second the other.
    template <int ROWS>
    void fetch(int64_t column) const {
        const T* from = column & Simd<T>::lanes ? previous : delta;
        if (!from) return;
        for (int i = 0; i < ROWS; i++) __builtin_prefetch(from + i * distance + column, 0, 2);
    }
};

// out[k][i] += sum over j of basis[k][j] delta[i][j]
template <typename T, int ROWS, int RANK>
static void add_to_p(Rows<const T> delta, Rows<const T> basis, Rows<T> out, int64_t columns, Next<T> next) {
    typename Simd<T>::Vector sums[RANK][ROWS] = {};
    int64_t j = 0;
    for (; j + Simd<T>::lanes <= columns; j += Simd<T>::lanes) {
        next.template fetch<ROWS>(j);
        typename Simd<T>::Vector rows[ROWS];
        for (int i = 0; i < ROWS; i++) rows[i] = load(delta.first + i * delta.distance + j);
        for (int k = 0; k < RANK; k++) {
            const auto factor = load(basis.first + k * basis.distance + j);
            for (int i = 0; i < ROWS; i++) sums[k][i] += factor * rows[i];
        }
    }
    for (int k = 0; k < RANK; k++)
        for (int i = 0; i < ROWS; i++) {
            T sum = 0;
            for (int lane = 0; lane < Simd<T>::lanes; lane++) sum += sums[k][i][lane];
            for (int64_t rest = j; rest < columns; rest++)
                sum += basis.first[k * basis.distance + rest] * delta.first[i * delta.distance + rest];
            out.first[k * out.distance + i] += sum;
        }
}

// out[k][j] += sum over i of basis[k][i] delta[i][j]
template <typename T, int ROWS, int RANK>
static void add_to_q(Rows<const T> delta, Rows<const T> basis, Rows<T> out, int64_t columns, Next<T> next) {
    T coefficients[RANK][ROWS];
    for (int k = 0; k < RANK; k++)
        for (int i = 0; i < ROWS; i++) coefficients[k][i] = basis.first[k * basis.distance + i];
    int64_t j = 0;
    for (; j + Simd<T>::lanes <= columns; j += Simd<T>::lanes) {
        next.template fetch<ROWS>(j);
        typename Simd<T>::Vector rows[ROWS];
        for (int i = 0; i < ROWS; i++) rows[i] = load(delta.first + i * delta.distance + j);
        for (int k = 0; k < RANK; k++) {
            auto sum = load(out.first + k * out.distance + j);
            for (int i = 0; i < ROWS; i++) sum += coefficients[k][i] * rows[i];
            store(out.first + k * out.distance + j, sum);
        }
    }
    for (; j < columns; j++)
        for (int k = 0; k < RANK; k++)
            for (int i = 0; i < ROWS; i++)
                out.first[k * out.distance + j] += coefficients[k][i] * delta.first[i * delta.distance + j];
}

// Calls f(first of up to MOST ranks, how many they are, whether they are the last ones).
template <int MOST, typename F>
static inline void for_ranks(int64_t rank, F f, int64_t k = 0) {
    for (; k + MOST < rank; k += MOST) f(k, Number<MOST>{}, false);
    if constexpr (MOST > 1)
        if (k + MOST > rank) return for_ranks<MOST - 1>(rank, f, k);
    f(k, Number<MOST>{}, true);
}

// So many ranks are worked on together. With more, a product's sums are written and read again less often; a factor's
// rows, which in matrices of some widths lie where a cache can keep only eight lines, get into each other's way.
static constexpr int PRODUCT_RANKS = 8, FACTOR_RANKS = 4;

// As many floats as there are upper halves of them.
static inline typename Simd<float>::Vector widened(const uint16_t* halves) {
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
    typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    const auto bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(halves), Bits) << 16;
    return (typename Simd<float>::Vector)bits;
}

static inline float widened_one(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float number;
    __builtin_memcpy(&number, &bits, sizeof number);
    return number;
}

// to += scale halves
template <typename T, int ROWS>
static void add_halves(Rows<T> to, const uint16_t* halves, T scale, int64_t columns) {
    for (int i = 0; i < ROWS; i++) {
        T* const row = to.first + i * to.distance;
        const uint16_t* const from = halves + i * to.distance;
        int64_t j = 0;
        if constexpr (sizeof(T) == sizeof(float))
            for (; j + Simd<T>::lanes <= columns; j += Simd<T>::lanes)
                store(row + j, load(row + j) + scale * widened(from + j));
        for (; j < columns; j++) row[j] += scale * widened_one(from[j]);
    }
}

// to: the upper halves of floats, to which row + columns[j] was added below.
template <typename T>
static void cut_row(uint16_t* to, const T* from, uint32_t row, const uint32_t* columns, int64_t count) {
    int64_t j = 0;
    if constexpr (sizeof(T) == sizeof(float)) {
        typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
        typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
        for (; j + Simd<T>::lanes <= count; j += Simd<T>::lanes) {
            const Bits bits = (Bits)load(from + j), drawn = row + *reinterpret_cast<const Bits*>(columns + j);
            *reinterpret_cast<Halves*>(to + j) = __builtin_convertvector((bits + (drawn & 0xFFFF)) >> 16, Halves);
        }
    }
    for (; j < count; j++) {
        const float number = float(from[j]);
        uint32_t bits;
        __builtin_memcpy(&bits, &number, sizeof bits);
        to[j] = (bits + ((row + columns[j]) & 0xFFFF)) >> 16;
    }
}

template <typename T, int ROWS>
static void keep_rows(const Keep<T>& a, int64_t i, int64_t j, int64_t columns, int64_t) {
    T memory[ROWS * TILE];
    Rows<const T> from{a.delta + i * a.m + j, a.m};
    if (a.rank)
        for_ranks<PRODUCT_RANKS>(a.rank, [&](int64_t k, auto ranks, bool) {
            add_product<T, ROWS, ranks.value, true, false>({memory, TILE}, from, nullptr, 0,
                                                           {a.p + k * a.n + i, a.n}, {a.q + k * a.m + j, a.m}, T(-1),
                                                           columns);
            from = {memory, TILE};
        });
    for (int row = 0; row < ROWS; row++)
        cut_row(a.halves + (i + row) * a.m + j, from.first + row * from.distance, a.rows[i + row], a.columns + j,
                columns);
}

template <typename T, int ROWS>
static void half_step_rows(const HalfStep<T>& a, int64_t i, int64_t j, int64_t columns, int64_t following) {
    const int64_t n = a.n, m = a.m;
    const Rows<T> delta{a.delta + i * m + j, m};
    if (a.previous) {
        T memory[ROWS * TILE];
        Rows<const T> from{a.previous + i * m + j, m};
        for_ranks<PRODUCT_RANKS>(a.previous_rank, [&](int64_t k, auto ranks, bool last) {
            const Rows<const T> p{a.p + k * n + i, n}, q{a.q + k * m + j, m};
            if (last)
                return add_product<T, ROWS, ranks.value, true, true>(delta, from, delta.first, a.scale, p, q, T(-1),
                                                                     columns);
            add_product<T, ROWS, ranks.value, true, false>({memory, TILE}, from, nullptr, 0, p, q, T(-1), columns);
            from = {memory, TILE};
        });
    }
    if (a.halves) add_halves<T, ROWS>(delta, a.halves + i * m + j, a.scale, columns);
    Next<T> next{};
    if (following) next = {a.delta + following, a.previous ? a.previous + following : nullptr, m};
    for_ranks<FACTOR_RANKS>(a.rank, [&](int64_t k, auto ranks, bool) {
        const int64_t p = k * n + i, q = k * m + j;
        const Rows<const T> rows{delta.first, m};
        if (a.makes_q) add_to_q<T, ROWS, ranks.value>(rows, {a.basis + p, n}, {a.out + q, m}, columns, next);
        else add_to_p<T, ROWS, ranks.value>(rows, {a.basis + q, m}, {a.out + p, n}, columns, next);
        next = {};
    });
}

template <typename T, int ROWS>
static void product_rows(const Product<T>& a, int64_t i, int64_t j, int64_t columns, int64_t) {
    const Rows<T> out{a.out + i * a.m + j, a.m};
    Rows<const T> from{a.from ? a.from + i * a.m + j : nullptr, a.m};
    for_ranks<PRODUCT_RANKS>(a.rank, [&](int64_t k, auto ranks, bool) {
        const auto add = from.first ? add_product<T, ROWS, ranks.value, true, false>
                                    : add_product<T, ROWS, ranks.value, false, false>;
        add(out, from, nullptr, 0, {a.p + k * a.n + i, a.n}, {a.q + k * a.m + j, a.m}, a.sign, columns);
        from = {out.first, a.m};
    });
}

// Goes over a part of a matrix, four rows at a time. Each part of them is told where the following one starts; 0 where
// there is none of four rows.
template <typename Arguments, typename Four, typename One>
static void over(const Arguments& arguments, const Part& part, Four four, One one) {
    int64_t i = part.row;
    for (; i < part.row_end; i += i + 4 <= part.row_end ? 4 : 1)
        for (int64_t j = part.column; j < part.column_end; j += TILE) {
            const int64_t columns = part.column_end - j < TILE ? part.column_end - j : TILE;
            int64_t following = 0;
            if (j + TILE < part.column_end) following = i * arguments.m + j + TILE;
            else if (i + 8 <= part.row_end) following = (i + 4) * arguments.m + part.column;
            (i + 4 <= part.row_end ? four : one)(arguments, i, j, columns, following);
        }
}

template <typename T>
static void half_step(const HalfStep<T>& arguments, const Part& part) {
    over(arguments, part, half_step_rows<T, 4>, half_step_rows<T, 1>);
}

template <typename T>
static void keep(const Keep<T>& arguments, const Part& part) {
    over(arguments, part, keep_rows<T, 4>, keep_rows<T, 1>);
}

template <typename T>
static void product(const Product<T>& arguments, const Part& part) {
    over(arguments, part, product_rows<T, 4>, product_rows<T, 1>);
}
