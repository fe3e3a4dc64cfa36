// vector_text on the CPU.
//
// What       [+-] digits [. digits] [e [+-] digits], with a digit before or behind the point; or inf, infinity, nan,
//            in any case. Nothing else is a number.
// Numerics   the float32 next to the decimal number, of two equally near the even one: rounded once, as strtof does.
//            float(text) of Python rounds to double first, which now and then, as of 7.038531e-26, ends on the other
//            side. Short numbers are a product or quotient of two doubles that are exact, so it is rounded once to
//            double. To round that to float32 is the same as to round the number itself, unless it is the midpoint
//            of two floats, which the number may be beside: that, and what is not short, is left to from_chars.
#include "fastkit/vector_text.h"

#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>

namespace fastkit {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr uint64_t kExact = uint64_t{1} << 53;  // integers up to here are doubles
constexpr int kMostDigits = 19;                 // of any digits so many are below 2^64
constexpr double kPowers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                              1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
constexpr int64_t kExactPower = 22;
constexpr uint64_t kIntegerPowers[] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000};
constexpr int64_t kGreatExponent = 100000000000000000;  // beyond any length of a text

bool is_blank(char c) { return c == ' ' || c == '\t'; }
bool is_digit(char c) { return static_cast<unsigned char>(c - '0') < 10; }

// Between two floats that both are normal: a double's last 29 bits are what a float has no room for.
bool is_midpoint(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return (bits & 0x1fffffff) == 0x10000000;
}

bool spells(const char* p, const char* end, const char* name) {
  for (; *name != '\0'; ++p, ++name) {
    if (p == end || (*p | 0x20) != *name) return false;
  }
  return p == end;
}

// Digits, with or without a point and an exponent, which were seen to be a number; for what is too large or too small
// from_chars has no value.
float round_once(const char* digits, const char* end, int64_t exponent) {
  float value = 0;
  if (std::from_chars(digits, end, value).ec == std::errc{}) return value;
  bool behind = false, leading = true;
  int64_t magnitude = exponent;  // the number is below 10^magnitude
  for (const char* p = digits; p < end && (*p | 0x20) != 'e'; ++p) {
    if (*p == '.') {
      behind = true;
    } else if (leading && *p == '0') {
      magnitude -= behind;
    } else {
      leading = false;
      if (behind) break;
      ++magnitude;
    }
  }
  return magnitude < 0 ? 0 : std::numeric_limits<float>::infinity();
}

// w = 10 w + digit, of the digits from q on; returns what is behind them. Below `limit` bytes can be read.
const char* read_digits(const char* q, const char* end, const char* limit, uint64_t& w) {
  if (std::endian::native == std::endian::little && limit - q >= 8) {  // eight at a time: numbers differ in length
    uint64_t bytes;
    std::memcpy(&bytes, q, sizeof(bytes));
    bytes ^= 0x3030303030303030;  // digits are 0 to 9 now; of what is not, the first has or gets its highest bit here
    const int count = std::countr_zero((bytes | (bytes + 0x7676767676767676)) & 0x8080808080808080) / 8;
    if (count == 0) return q;
    bytes <<= 64 - 8 * count;  // zeros before the digits
    bytes = 10 * bytes + (bytes >> 8);
    const uint64_t hundreds = (bytes & 0x000000ff000000ff) * (100 + (uint64_t{1000000} << 32));
    const uint64_t ones = (bytes >> 16 & 0x000000ff000000ff) * (1 + (uint64_t{10000} << 32));
    w = w * kIntegerPowers[count] + ((hundreds + ones) >> 32);
    q += count;
    if (count < 8) return q;
  }
  for (; q < end && is_digit(*q); ++q) w = 10 * w + static_cast<uint64_t>(*q - '0');
  return q;
}

// Reads the number that begins at p, up to a blank; false if there is none.
bool read_number(const char*& p, const char* end, const char* limit, float& value) {
  const bool negative = *p == '-';
  const char* const digits = p + (negative | (*p == '+'));
  const char* q = digits;
  uint64_t w = 0;
  for (; q < end && is_digit(*q); ++q) w = 10 * w + static_cast<uint64_t>(*q - '0');
  int64_t count = q - digits, power = 0;
  if (q < end && *q == '.') {
    const char* const behind = ++q;
    q = read_digits(q, end, limit, w);
    power = behind - q;
    count -= power;
  }
  int64_t exponent = 0;
  if (count > 0 && q < end && (*q | 0x20) == 'e') {
    ++q;
    const bool below = q < end && *q == '-';
    if (q < end && (*q == '-' || *q == '+')) ++q;
    if (q == end || !is_digit(*q)) return false;
    for (; q < end && is_digit(*q); ++q) {
      if (exponent < kGreatExponent) exponent = 10 * exponent + (*q - '0');
    }
    if (below) exponent = -exponent;
  }
  if (count > 0 && (q == end || is_blank(*q))) {
    power += exponent;
    if (count <= kMostDigits && w <= kExact && power >= -kExactPower && power <= kExactPower) {
      const double exact = static_cast<double>(w);
      const double rounded = power < 0 ? exact / kPowers[-power] : exact * kPowers[power];
      value = is_midpoint(rounded) ? round_once(digits, q, exponent) : static_cast<float>(rounded);
    } else {
      value = round_once(digits, q, exponent);
    }
  } else {
    while (q < end && !is_blank(*q)) ++q;
    if (spells(digits, q, "nan")) {
      value = kNaN;
    } else if (spells(digits, q, "inf") || spells(digits, q, "infinity")) {
      value = std::numeric_limits<float>::infinity();
    } else {
      return false;
    }
  }
  value = std::copysign(value, negative ? -1.0f : 1.0f);
  p = q;
  return true;
}

}  // namespace

std::vector<int64_t> find_vector_lines(const char* text, int64_t size, int64_t most) {
  std::vector<int64_t> begins;
  int64_t at = 0;
  while (at < size && static_cast<int64_t>(begins.size()) < most) {
    begins.push_back(at);
    const void* feed = std::memchr(text + at, '\n', static_cast<size_t>(size - at));
    at = feed == nullptr ? size + 1 : static_cast<const char*>(feed) - text + 1;
  }
  begins.push_back(at);
  return begins;
}

VectorLine parse_vector_line(const char* text, int64_t size, int64_t begin, int64_t end, int64_t columns, float* row) {
  if (end > begin && text[end - 1] == '\r') --end;
  VectorLine line;
  line.begin = begin, line.end = end;
  const char *p = text + begin, *const last = text + end;
  while (p < last && !is_blank(*p)) ++p;
  line.word_end = p - text;
  bool zero = true, numbers = true;
  for (;;) {
    while (p < last && is_blank(*p)) ++p;
    if (p == last) break;
    if (line.fields < columns) {
      float value = kNaN;
      if (!read_number(p, last, text + size, value)) {
        numbers = false;
        while (p < last && !is_blank(*p)) ++p;
      }
      row[line.fields] = value;
      zero &= value == 0;
      if (line.fault == 0 && !std::isfinite(value)) line.fault = line.fields + 1;
    } else {
      while (p < last && !is_blank(*p)) ++p;
    }
    ++line.fields;
  }
  if (line.fields != columns || !numbers) {
    for (int64_t i = 0; i < columns; ++i) row[i] = kNaN;
  } else if (zero) {
    line.fault = -1;
  }
  return line;
}

int64_t format_vector(const float* row, int64_t columns, char* text) {
  char* p = text;
  for (int64_t i = 0; i < columns; ++i) {
    if (i > 0) *p++ = ' ';
    p = std::to_chars(p, p + kNumberBytes - 1, row[i]).ptr;
  }
  return p - text;
}

}  // namespace fastkit
