// Interface of vector_text: words and their numbers as text, a line for each, and back.
#pragma once

#include <cstdint>
#include <vector>

namespace fastkit {

// A line of text as offsets of its bytes: a word, which may be empty, and fields; between them blanks, which are
// spaces and tabs, and no other byte is. The line feed, and a carriage return before it, are not in the line.
struct VectorLine {
  int64_t begin = 0, word_end = 0, end = 0;
  int64_t fields = 0;  // behind the word
  int64_t fault = 0;   // the first field that is no finite number in float32, from 1 on; 0: all are, -1: and are zero
};

// Where the lines of a text begin, at most `most` of them, and where the line feed of the last is, or the text ends.
std::vector<int64_t> find_vector_lines(const char* text, int64_t size, int64_t most);

// The line [begin, end) of a text, with its line feed left out, and its numbers in `row`: NaN if it is not `columns`
// numbers.
VectorLine parse_vector_line(const char* text, int64_t size, int64_t begin, int64_t end, int64_t columns, float* row);

// Bytes that a number and a blank take at most.
inline constexpr int64_t kNumberBytes = 16;

// Numbers with a blank between, the shortest that are read back as they are; returns how many bytes they take.
int64_t format_vector(const float* row, int64_t columns, char* text);

}  // namespace fastkit
