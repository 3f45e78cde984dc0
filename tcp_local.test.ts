/**
 * The tests of tcp_local.ts. Those of `recvAll` mostly read from a scripted `recv`. Any other test
 * that needs a socket uses a real one on this machine, unless its comment says why not.
 *
 * `bun test -t PATTERN` runs the tests whose full title matches PATTERN, a regular expression: the
 * section's title, a space (where Bun prints ` > `), and the test's title. Put a `\` before a
 * parenthesis, and a `^` first for a whole section. To find a test, search this file for the stem
 * of a word: linger, leak, stall, starv, truncat. Here is a test to copy, and how to run it alone:
 *
 *     test("resolves to what the peer has sent", async () => {
 *       const { sock, peer } = await pair();
 *       peer.write("hello");
 *       expect(String(await sock.recv(100))).toBe("hello");
 *     });
 *
 *     bun test -t "recv resolves to what the peer has sent"
 *
 * `sock` is a connection of tcp_local.ts, and `peer` is its other end, a socket of `node:net`.
 * After a test, both are closed. If a test fails while a call is pending, Bun therefore reports two
 * errors: the first is the failure, and the second, an `EBADF`, is that of the pending call. The
 * helpers come after the tests:
 *
 * | for a test that needs                                       | use                       |
 * | ----------------------------------------------------------- | ------------------------- |
 * | a connection, and its other end                             | `pair()`                  |
 * | the same, with control over how much the kernel accepts     | `pairWithRoom()`          |
 * | a connection whose events the test fires itself             | `fakeConnection()`        |
 * | a fake server, for `connect` or the client                  | `peerServer()`            |
 * | a fake client, for `listen` or the server                   | `peerClient(port)`        |
 * | a server that runs a `serve` of the test                    | `serving(serve)`          |
 * | the program's server                                        | `programServer()`         |
 * | the program's client, which has sent its message            | `programClient()`         |
 * | a server in a process of its own                            | `spawnServer(script)`     |
 * | a script that runs to its end in a process of its own       | `run(["-e", script])`     |
 * | the same, but watched or killed while it runs               | `spawn(["-e", script])`   |
 * | what the peer receives, if its stream must end cleanly      | `receivedBy(peer)`        |
 * | the same, and whether its stream ends or is reset           | `streamTo(peer)`          |
 * | the error that a call rejects with                          | `failure(promise)`        |
 * | what the program prints in this process                     | `captured()`              |
 * | a lookup that finds certain addresses                       | `lookupFinds(addresses)`  |
 * | `Bun.connect` or `Bun.listen` to fail                       | `refuses(name, code)`     |
 * | to wait until Bun has looked at its sockets                 | `pollSockets()`           |
 * | to wait for anything else                                   | `until(words, condition)` |
 *
 * The sections, in order:
 *
 * - "recvAll": exactly N bytes (message framing), even if they arrive one at a time (short reads).
 * - "recv", "recvUntil", "for await": receiving, backpressure, one reader at a time.
 * - "sendAll", "an interrupted sendAll": sending, and what the peer sees if it fails.
 * - "shutdown", "close", "abort": half-closing, lingering, resetting.
 * - "timeout", "a busy connection": peers that stall, and calls that yield (no starvation).
 * - "a connection": its addresses, keep-alive, both directions at once.
 * - "connect", "listen": names and addresses, the errors and their stacks, `serve`, `stop`.
 * - "repr", "the server", "the client", "the command line", "a bundle": the program.
 * - "the README": its examples.
 * - "under load": floods, stalled clients, memory and descriptors of a process (no leak).
 * - "every order of events": every short sequence of calls and events, compared with a model. It is
 *   at the end of the file, after the helpers, and says how to add a method.
 */
import { afterEach, describe, expect, setDefaultTimeout, spyOn, test } from "bun:test";
import { drainMicrotasks } from "bun:jsc";
import { once } from "node:events";
import {
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import * as net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { format } from "node:util";
import type { Socket } from "bun";
import * as program from "./tcp_local.ts";
import { connect, Connection, EOFError, listen, recvAll, repr, SocketError } from "./tcp_local.ts";

const MiB = 2 ** 20;
const MESSAGE = Buffer.from("Hi there, server");
/** More than the kernel has room for, even where its buffers may grow to 32 MiB at both ends. */
const TOO_MUCH = Buffer.alloc(96 * MiB);
const HAS_PROC = existsSync("/proc/self/fd"); // Linux
setDefaultTimeout(30_000); // Bun's 5 seconds are too few for a slow or busy machine.

/** A timeout, in seconds, that a test lets expire. */
const SHORT = 0.02;

/** The methods that receive. The model for every order of events knows them by these names. */
const RECEIVING_METHODS = {
  recv: (sock: Connection, length: number) => sock.recv(length),
  recvUntil: (sock: Connection, length: number) => sock.recvUntil("\n", length),
};
/** Every way to receive `length` bytes. (If a newline comes first, `recvUntil` receives fewer.) */
const receivers = Object.entries({ ...RECEIVING_METHODS, recvAll }).map(([kind, receive]) => {
  return { kind, receive };
});

describe("recvAll", () => {
  test("puts a message together from each of the 32,768 ways to cut it (framing)", async () => {
    for (let cuts = 0; cuts < 2 ** 15; cuts += 1) {
      const sock = scripted(cut(MESSAGE, cuts));
      const message = await recvAll(sock, 16);
      if (!message.equals(MESSAGE)) {
        throw new Error(`cuts ${cuts.toString(2)}: got ${message}, want ${MESSAGE}`);
      }
    }
  });

  test("reassembles messages that a peer sends one byte at a time (short read, fragmented)", async () => {
    const { sock, peer } = await pair();
    const first = recvAll(sock, 16);
    for (const byte of MESSAGE) {
      peer.write(Buffer.of(byte));
      await pollSockets(); // so that the byte is a piece of its own
    }
    peer.write("and one more");
    expect(await first).toEqual(MESSAGE);
    expect(String(await recvAll(sock, 12))).toBe("and one more");
  });

  test("separates messages that arrive in one piece (coalesced, Nagle)", async () => {
    const { sock, peer } = await pair();
    peer.write("firstsecondthird");
    const messages: string[] = [];
    for (const length of [5, 6, 5]) {
      const message = await recvAll(sock, length);
      messages.push(String(message));
    }
    expect(messages).toEqual(["first", "second", "third"]);
  });

  test("never asks for more bytes than are missing", async () => {
    const sock = scripted([Buffer.from("Hi there"), Buffer.from(", "), Buffer.from("server")]);
    await recvAll(sock, 16);
    expect(sock.asked).toEqual([16, 8, 6]);
  });

  test("resolves to a buffer of its own (shared memory)", async () => {
    const piece = Buffer.from(MESSAGE);
    const message = await recvAll(scripted([piece]), 16);
    piece.fill("x");
    expect(message).toEqual(MESSAGE);
    expect(message.buffer.byteLength).toBe(16);
  });

  test("takes a complete message at once, and leaves an incomplete one (tryRecvAll)", async () => {
    const { sock, peer } = await pair();
    peer.write("hello!");
    await sock.recv(1); // The rest has arrived, too.
    for (const length of [6, 0, 1.5, -1, NaN]) expect(sock.tryRecvAll(length)).toBeUndefined();
    const message = await recvAll(sock, 5);
    expect(String(message)).toBe("ello!");
    expect(message.buffer.byteLength).toBe(5);
  });

  const replacements = [
    { where: "on the connection", spyOnRecv: (sock: Connection) => spyOn(sock, "recv") },
    { where: "for all connections", spyOnRecv: () => spyOn(Connection.prototype, "recv") },
  ];
  test.each(replacements)(
    "calls a recv that was replaced $where (spies, byte counters)",
    async ({ spyOnRecv }) => {
      const { sock, peer } = await pair();
      peer.write("hello!");
      await sock.recv(1); // The rest has arrived, too.
      using spy = spyOnRecv(sock);
      await recvAll(sock, 5);
      expect(spy.mock.calls).toEqual([[5]]);
    },
  );

  test("reads nothing for a length of 0", async () => {
    const sock = scripted([MESSAGE]);
    expect(await recvAll(sock, 0)).toEqual(Buffer.alloc(0));
    expect(sock.asked).toEqual([]);
  });

  const invalidLengths = [-1, 1.5, NaN, Infinity];
  test.each(invalidLengths)("rejects a length of %p, and reads nothing", async (length) => {
    const sock = scripted([MESSAGE]);
    const error = await failure(recvAll(sock, length));
    expect(error).toBeInstanceOf(RangeError);
    expect(error).toMatchObject({
      message: `length must be a non-negative integer, not ${length}`,
    });
    expect(sock.asked).toEqual([]);
  });

  const lengths = [...MESSAGE.keys()]; // 0 to 15
  test.each(lengths)(
    "rejects when the stream ends after %p of 16 bytes (truncated)",
    async (length) => {
      const partial = MESSAGE.subarray(0, length);
      const pieces = cut(partial, 0b100100); // after the third and the sixth byte
      const error = await failure(recvAll(scripted(pieces), 16));
      expect(error).toBeInstanceOf(EOFError);
      expect(error).toMatchObject({
        name: "EOFError",
        message: `socket closed ${length} bytes into a 16-byte message`,
        partial,
        expected: 16,
      });
    },
  );

  test("passes on recv's error unchanged, even in the middle of a message", async () => {
    const error = new Error("no luck");
    const pieces = [MESSAGE.subarray(0, 5)];
    async function recv(): Promise<Buffer> {
      const piece = pieces.shift();
      if (!piece) throw error;
      return piece;
    }
    expect(await failure(recvAll({ recv }, 16))).toBe(error);
  });

  const notBytes = [{}, undefined, "a string", new ArrayBuffer(4), new Uint16Array(4)];
  test.each(notBytes)("rejects if recv resolves to %p", async (given) => {
    const recv = async () => given as Uint8Array;
    const error = await failure(recvAll({ recv }, 16));
    expect(error).toBeInstanceOf(TypeError);
    expect(error).toMatchObject({ message: "recv must resolve to bytes" });
  });

  test("loses what it has read when it times out", async () => {
    const { sock, peer } = await pair(SHORT);
    peer.write("hell");
    expect(await failure(recvAll(sock, 5))).toMatchObject({ code: "ETIMEDOUT" });
    peer.write("o, world");
    await pollSockets();
    expect(String(await sock.recv(100))).toBe("o, world");
  });

  test("does not copy the message again for each of 16,384 pieces", async () => {
    const piece = Buffer.alloc(4096, "x");
    const start = processorTime();
    const message = await recvAll({ recv: async () => piece }, 64 * MiB);
    const seconds = processorTime() - start;
    expect(message.equals(Buffer.alloc(64 * MiB, "x"))).toBeTrue();
    // Concatenating at each piece would copy 512 GiB.
    expect(seconds).toBeLessThan(4);
  });
});

describe("recv", () => {
  test("resolves to what the peer has sent", async () => {
    const { sock, peer } = await pair();
    peer.write("hello");
    expect(String(await sock.recv(100))).toBe("hello");
  });

  test("waits until the peer sends", async () => {
    const { sock, peer } = await pair();
    const receiving = sock.recv(100);
    await pollSockets();
    peer.write("hello");
    expect(String(await receiving)).toBe("hello");
  });

  test("leaves what does not fit for the next call", async () => {
    const { sock, peer } = await pair();
    peer.write("hello");
    expect(String(await sock.recv(2))).toBe("he");
    expect(String(await sock.recv(100))).toBe("llo");
  });

  test("resolves to an empty buffer at the end of the stream, again and again", async () => {
    const { sock, peer } = await pair();
    peer.end();
    expect(await sock.recv(1)).toHaveLength(0);
    expect(await sock.recv(1)).toHaveLength(0);
  });

  test("resolves to what arrived before a reset (RST), and then rejects", async () => {
    const { sock, peer } = await pair();
    peer.write("hello");
    expect(String(await sock.recv(2))).toBe("he"); // The rest has arrived, too.
    peer.resetAndDestroy();
    await once(peer, "close");
    expect(String(await sock.recv(100))).toBe("llo");
    const reset = { name: "SocketError", code: "ECONNRESET", message: "connection reset by peer" };
    expect(await failure(sock.recv(100))).toMatchObject(reset);
    expect(await failure(sock.recv(100))).toMatchObject(reset);
  });

  test("resolves to what arrived before a reset, even if a sendAll hit the reset first", async () => {
    const { sock, peer } = await pair();
    peer.write("ab");
    expect(String(await sock.recv(1))).toBe("a");
    peer.write("cd");
    await pollSockets(); // Bun has read that, but it reads no more, because nobody asks for it.
    peer.write("ef");
    peer.resetAndDestroy();
    // A write hits the reset at once. Bun hears of it when the event loop turns.
    expect(await failure(sock.sendAll("x"))).toMatchObject({ code: "ECONNRESET" });
    expect(String(await recvAll(sock, 5))).toBe("bcdef");
    expect(await failure(sock.recv(100))).toMatchObject({ code: "ECONNRESET" });
  });

  const invalidLengths = [0, -1, 1.5, NaN, Infinity, undefined] as number[];
  test.each(invalidLengths)("rejects a maxLength of %p, and receives nothing", async (length) => {
    const { sock, peer } = await pair();
    peer.write("hello");
    for (const receive of Object.values(RECEIVING_METHODS)) {
      const error = await failure(receive(sock, length));
      expect(error).toBeInstanceOf(RangeError);
      expect(error).toMatchObject({
        message: `maxLength must be a positive integer, not ${length}`,
      });
    }
    expect(String(await sock.recv(100))).toBe("hello");
  });

  test("resolves to what there is if asked for up to 2 ** 53 bytes", async () => {
    const { sock, peer } = await pair();
    peer.write("hello");
    expect(String(await sock.recv(2))).toBe("he");
    expect(String(await sock.recv(2 ** 53))).toBe("llo");
  });

  test("resolves to memory that the caller may transfer to a worker", async () => {
    const { sock, peer } = await pair();
    peer.write("hello, world");
    const hello = await sock.recv(5);
    structuredClone(hello, { transfer: [hello.buffer as ArrayBuffer] });
    const comma = await sock.recv(2);
    structuredClone(comma, { transfer: [comma.buffer as ArrayBuffer] });
    expect(String(await sock.recv(100))).toBe("world");
    peer.end();
    // Twice: if empty results shared their memory, the second could not be transferred.
    for (let i = 0; i < 2; i += 1) {
      const empty = await sock.recv(100);
      structuredClone(empty, { transfer: [empty.buffer as ArrayBuffer] });
    }
  });

  test("does not keep a large piece alive through a small result (shared memory, leaks)", async () => {
    const { sock, peer } = await pair();
    peer.write(Buffer.alloc(100_000));
    const first = await sock.recv(1);
    await recvAll(sock, 99_998);
    const last = await sock.recv(100);
    // A view of the 100,000 bytes would have all of them as its `buffer`.
    expect(first.buffer.byteLength).toBe(1);
    expect(last.buffer.byteLength).toBe(1);
  });

  test("holds a fast peer back while nobody reads (backpressure), and loses nothing", async () => {
    const { sock, peer } = await pair();
    peer.write("x");
    await sock.recv(1); // This waits, which resumes the socket. The next piece must pause it again.
    const piece = Buffer.alloc(MiB, "0123456789abcde");
    for (let i = 0; i < 96; i += 1) peer.write(piece);
    await untilItStays(() => peer.writableLength);
    // The kernel may hold 64 of the 96 MiB if its buffers can grow to 32 MiB at each end.
    expect(peer.writableLength).toBeGreaterThan(16 * MiB);
    for (let i = 0; i < 96; i += 1) {
      const received = await recvAll(sock, piece.length);
      expect(received.equals(piece)).toBeTrue();
    }
  });

  test("resolves to the bytes that are there, even if close is called in the same tick", async () => {
    // Each round makes three calls. In one of the 64 rounds, the third is a 64th call, which yields
    // to the event loop before it resolves.
    for (let round = 0; round < 64; round += 1) {
      const { sock, peer } = await pair();
      peer.write("hello!");
      await sock.recv(1);
      await sock.recv(1);
      const receiving = sock.recv(4);
      sock.close();
      const got = String(await receiving);
      expect({ round, got }).toEqual({ round, got: "llo!" });
    }
  });

  test("takes small pieces from a large one without copying the rest each time", async () => {
    // The socket is a fake, because a kernel with small buffers never delivers so much at once.
    const { sock, socket } = fakeConnection();
    void Connection.handlers.data?.(socket, Buffer.alloc(MiB));
    const start = processorTime();
    for (let taken = 0; taken < MiB; taken += 64) await sock.recv(64);
    // Copying the rest each time would copy 8 GiB.
    expect(processorTime() - start).toBeLessThan(0.5);
  });

  const microtasks = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]; // By 9, a caller that need not wait has resumed.
  test.each(microtasks)(
    "refuses a second reader (concurrent, race), %p microtasks after the first",
    async (count) => {
      const { sock, peer } = await pair();
      peer.write("Hi the");
      expect(String(await sock.recv(1))).toBe("H"); // The rest has arrived, too.
      const first = recvAll(sock, 15);
      for (let i = 0; i < count; i += 1) await null;
      const others = receivers.map(({ receive }) => receive(sock, 15));
      const errors = await Promise.all(others.map(failure));
      for (const error of errors) {
        expect(error).toMatchObject({
          name: "Error",
          message: "recv called while another recv is pending",
        });
      }
      peer.write("re, server");
      expect(String(await first)).toBe("i there, server"); // It was not disturbed.
    },
  );

  describe.each(receivers)(
    "refuses other readers (concurrent) until the caller of a $kind has resumed,",
    ({ receive }) => {
      test.each(microtasks)("tried after %p microtasks", async (count) => {
        const { sock, peer } = await pair();
        peer.write("?" + "line\nbody!x".repeat(128));
        await sock.recv(1); // All the rest has arrived, too.
        for (let round = 0; round < 128; round += 1) {
          // Every 64th call yields to the event loop before it resolves. The extra call in every
          // other round shifts the count, so that the first reader is such a call in some rounds.
          if (round % 2 === 0) await sock.sendAll("");
          let hasGoneOn = false;
          const first = receive(sock, 5).then((line) => {
            hasGoneOn = true;
            return String(line);
          });
          for (let i = 0; i < count; i += 1) await null;
          const isFree = hasGoneOn;
          const second = await sock.recv(5).then(String, (error: Error) => error.message);
          expect(await first).toBe("line\n");
          if (isFree) {
            expect(second).toBe("body!");
          } else {
            expect(second).toBe("recv called while another recv is pending");
            expect(String(await sock.recv(5))).toBe("body!");
          }
          expect(String(await sock.recv(1))).toBe("x");
        }
      });
    },
  );

  test("frees a large piece once it is taken, but no memory that other bytes share (leak)", async () => {
    // The socket is a fake, because Bun gives each piece memory of its own.
    const { sock, socket } = fakeConnection();
    const alone = Buffer.from(new ArrayBuffer(50_000));
    const shared = Buffer.from(new ArrayBuffer(100_000), 0, 50_000);
    for (const piece of [alone, shared]) {
      void Connection.handlers.data?.(socket, piece);
      await sock.recv(1);
      await sock.recv(49_999);
    }
    expect(alone.buffer.byteLength).toBe(0);
    expect(shared.buffer.byteLength).toBe(100_000);
  });

  test("resolves to no bytes, as at the end of the stream, when the peer's process is killed", async () => {
    const isConnected = Promise.withResolvers<void>();
    const received = Promise.withResolvers<Buffer>();
    const listener = await serving(async (sock) => {
      isConnected.resolve();
      received.resolve(await sock.recv(1));
    });
    const script = `
      import { connect } from "./tcp_local.ts";
      const sock = await connect("127.0.0.1", ${listener.port});
      await sock.recv(1);
    `;
    const peer = spawn(["-e", script]);
    await isConnected.promise;
    peer.kill("SIGKILL");
    expect(await received.promise).toHaveLength(0);
  });
});

describe("recvUntil", () => {
  /** What the calls of recvUntil resolve to, until the end of the stream. */
  const streams = [
    {
      kind: "resolves to a line at a time, with its delimiter",
      pieces: ["GET / HTTP/1.1\r\nHost: example\r\n\r\n"],
      gives: ["GET / HTTP/1.1\r\n", "Host: example\r\n", "\r\n", ""],
    },
    {
      kind: "finds a delimiter given as bytes",
      delimiter: Uint8Array.of(0, 1),
      pieces: ["a\0b\0\x01c\0\x01"],
      gives: ["a\0b\0\x01", "c\0\x01", ""],
    },
    {
      kind: "takes a delimiter as UTF-8",
      delimiter: "ö",
      pieces: ["Größer schön"],
      gives: ["Grö", "ßer schö", "n", ""],
    },
    {
      kind: "waits for a line, and finds a delimiter that arrives in two pieces",
      pieces: ["a", "b\r", "\nc", "d\r\n"],
      gives: ["ab\r\n", "cd\r\n", ""],
    },
    {
      kind: "puts the rest of a piece in front of the next one",
      pieces: ["a\r\nbcdefgh", "ij\r\n"],
      gives: ["a\r\n", "bcdefghij\r\n", ""],
    },
    {
      kind: "resolves to a line of exactly maxLength bytes",
      maxLength: 5,
      pieces: ["abc\r\nde\r\n"],
      gives: ["abc\r\n", "de\r\n", ""],
    },
    {
      kind: "resolves to maxLength bytes if the line is longer, which may cut the delimiter in two",
      maxLength: 4,
      pieces: ["abc\r\nde\r\n"],
      gives: ["abc\r", "\nde\r", "\n", ""],
    },
    {
      kind: "counts maxLength from the start of the line, not of the piece",
      maxLength: 5,
      pieces: ["ab\r\ncd\r\nef\r\n"],
      gives: ["ab\r\n", "cd\r\n", "ef\r\n", ""],
    },
    {
      kind: "resolves to maxLength bytes if the delimiter is longer than that",
      maxLength: 1,
      pieces: ["a\r\n"],
      gives: ["a", "\r", "\n", ""],
    },
    {
      kind: "does not wait for more than maxLength bytes",
      maxLength: 3,
      pieces: ["ab", "c", "defg"],
      gives: ["abc", "def", "g", ""],
    },
    {
      kind: "resolves to what is left at the end of the stream, and then to an empty buffer",
      pieces: ["abc\r\nde"],
      gives: ["abc\r\n", "de", "", ""],
    },
    {
      kind: "resolves to what is left, even if that is most of a piece",
      pieces: ["a\r\nbcdefgh"],
      gives: ["a\r\n", "bcdefgh", ""],
    },
    {
      kind: "does not mistake half a delimiter for a whole one",
      pieces: ["a\rb\nc\n\r\r\n"],
      gives: ["a\rb\nc\n\r\r\n", ""],
    },
  ];
  test.each(streams)("$kind", async ({ delimiter = "\r\n", maxLength = 100, pieces, gives }) => {
    const { sock, peer } = await pair();
    const received: string[] = [];
    async function receive(): Promise<void> {
      for (let i = 0; i < gives.length; i += 1) {
        const line = await sock.recvUntil(delimiter, maxLength);
        received.push(String(line));
      }
    }
    const receiving = receive();
    for (const piece of pieces) {
      peer.write(piece);
      await pollSockets(); // so that it stays a piece of its own
    }
    peer.end();
    await receiving;
    expect(received).toEqual(gives);
  });

  test("leaves the bytes after the line to recvAll", async () => {
    const { sock, peer } = await pair();
    peer.write("5\r\nhello0\r\n");
    expect(String(await sock.recvUntil("\r\n", 100))).toBe("5\r\n");
    expect(String(await recvAll(sock, 5))).toBe("hello");
    expect(String(await sock.recvUntil("\r\n", 100))).toBe("0\r\n");
  });

  test("loses nothing when it times out", async () => {
    const { sock, peer } = await pair(SHORT);
    peer.write("half a l");
    expect(await failure(sock.recvUntil("\n", 100))).toMatchObject({ code: "ETIMEDOUT" });
    peer.write("ine\n");
    expect(String(await sock.recvUntil("\n", 100))).toBe("half a line\n");
  });

  test("loses nothing when the peer resets the connection", async () => {
    const { sock, peer } = await pair();
    peer.write("half a l");
    const receiving = failure(sock.recvUntil("\n", 100));
    await pollSockets();
    peer.resetAndDestroy();
    expect(await receiving).toMatchObject({ code: "ECONNRESET" });
    expect(String(await sock.recv(100))).toBe("half a l");
    expect(await failure(sock.recvUntil("\n", 100))).toMatchObject({ code: "ECONNRESET" });
  });

  const invalidDelimiters = [
    { delimiter: "", Kind: RangeError, says: "the delimiter must not be empty" },
    { delimiter: Buffer.of(), Kind: RangeError, says: "the delimiter must not be empty" },
    { delimiter: undefined, Kind: TypeError, says: "expected a string or bytes, not undefined" },
    { delimiter: 10, Kind: TypeError, says: "expected a string or bytes, not 10" },
    { delimiter: /\n/, Kind: TypeError, says: "expected a string or bytes, not /\\n/" },
  ];
  test.each(invalidDelimiters)(
    "rejects with an error, and receives nothing: $says",
    async ({ delimiter, Kind, says }) => {
      const { sock, peer } = await pair();
      peer.write("hello\n");
      const error = await failure(sock.recvUntil(delimiter as string, 100));
      expect(error).toBeInstanceOf(Kind);
      expect(error).toMatchObject({ message: says });
      expect(String(await sock.recvUntil("\n", 100))).toBe("hello\n");
    },
  );

  test("waits for the delimiter it was called with, even if the caller changes the buffer", async () => {
    const { sock, peer } = await pair();
    const delimiter = Buffer.from("\n");
    const receiving = sock.recvUntil(delimiter, 100);
    delimiter.write("!");
    peer.write("hello! world\n");
    expect(String(await receiving)).toBe("hello! world\n");
  });

  test("searches no more than maxLength bytes at a time, so it costs little more than a recv", async () => {
    const { sock, peer } = await pair(0.05);
    peer.write(Buffer.alloc(512 * 1024, "a"));
    // This call takes nothing. It only waits until everything has arrived.
    expect(await failure(sock.recvUntil("ab", MiB))).toMatchObject({ code: "ETIMEDOUT" });
    async function timeOf(call: () => Promise<Buffer>): Promise<number> {
      const start = processorTime();
      for (let i = 0; i < 10_000; i += 1) await call();
      return processorTime() - start;
    }
    const timeOfRecv = await timeOf(() => sock.recv(2));
    const timeOfRecvUntil = await timeOf(() => sock.recvUntil("ab", 2));
    // If each call searched everything, the ratio would be about 15.
    expect(timeOfRecvUntil / timeOfRecv).toBeLessThan(6);
  });

  const idlers = [
    {
      kind: "recvUntil waits, holding the last few bytes",
      idle: (sock: Connection) => void failure(sock.recvUntil("\n", 100)), // to the end of the test
    },
    { kind: "recvAll has taken all of it", idle: (sock: Connection) => recvAll(sock, 4) },
  ];
  test.each(idlers)("does not keep a large piece alive (leak): $kind", async ({ idle }) => {
    const largePieces: WeakRef<Buffer>[] = [];
    const onData = Connection.handlers.data;
    using handler = spyOn(Connection.handlers, "data");
    handler.mockImplementation((socket, bytes) => {
      if (bytes.length > 1024) largePieces.push(new WeakRef(bytes));
      return onData?.(socket, bytes);
    });
    for (let i = 0; i < 20; i += 1) {
      const { sock, peer } = await pair();
      const message = Buffer.alloc(64 * 1024);
      peer.write(Buffer.concat([message, Buffer.from("rest")]));
      await recvAll(sock, message.length);
      await idle(sock);
    }
    await pollSockets();
    handler.mockClear(); // A spy keeps what it was called with.
    Bun.gc(true);
    const kept = largePieces.filter((piece) => piece.deref() !== undefined);
    expect(kept.length).toBeLessThan(10); // The garbage collector may miss some garbage.
  });
});

describe("for await", () => {
  test("receives to the end of the stream", async () => {
    const { sock, peer } = await pair();
    peer.end(Buffer.alloc(MiB, "0123456789abcde"));
    const pieces: Buffer[] = [];
    for await (const bytes of sock) pieces.push(bytes);
    expect(Buffer.concat(pieces).equals(Buffer.alloc(MiB, "0123456789abcde"))).toBeTrue();
    expect(pieces.every((bytes) => bytes.length > 0)).toBeTrue();
  });

  test("yields at most 64 KiB at a time, even if more has arrived", async () => {
    // The socket is a fake, because a kernel with small buffers never delivers so much at once.
    const { sock, socket } = fakeConnection();
    void Connection.handlers.data?.(socket, Buffer.alloc(100_000));
    for await (const bytes of sock) {
      expect(bytes).toHaveLength(65_536);
      break;
    }
  });

  test("calls a recv that was replaced on the connection (spies, byte counters)", async () => {
    const { sock, peer } = await pair();
    using spy = spyOn(sock, "recv");
    peer.end();
    await receiveToTheEnd(sock);
    expect(spy).toHaveBeenCalledTimes(1);
  });

  test("leaves the connection open after a break", async () => {
    const { sock, peer } = await pair();
    peer.write("hello");
    for await (const bytes of sock) {
      expect(String(bytes)).toBe("hello");
      break;
    }
    peer.write("world");
    expect(String(await sock.recv(100))).toBe("world");
    await sock.sendAll("and back");
    sock.close();
    expect(String(await receivedBy(peer))).toBe("and back");
  });

  test("yields what arrived first, and then throws recv's error", async () => {
    const { sock, peer } = await pair();
    const pieces: string[] = [];
    async function iterate(): Promise<void> {
      for await (const bytes of sock) {
        pieces.push(String(bytes));
        peer.resetAndDestroy();
      }
    }
    peer.write("hello");
    expect(await failure(iterate())).toMatchObject({ code: "ECONNRESET" });
    expect(pieces).toEqual(["hello"]);
  });
});

describe("sendAll", () => {
  const bytes = new Uint8Array([0, 1, 2, 253, 254, 255]);
  const shared = new SharedArrayBuffer(2);
  new Uint8Array(shared).set([7, 8]);
  const payloads = [
    {
      kind: "a string as UTF-8 (Unicode, emoji)",
      data: "größer 🙂",
      sent: Buffer.from("6772c3b6c39f657220f09f9982", "hex"),
    },
    { kind: "nothing for an empty string", data: "", sent: Buffer.alloc(0) },
    { kind: "an ArrayBuffer", data: bytes.buffer, sent: Buffer.from(bytes) },
    { kind: "a SharedArrayBuffer", data: shared, sent: Buffer.of(7, 8) },
    {
      kind: "the part that a view shows",
      data: bytes.subarray(2, 5),
      sent: Buffer.of(2, 253, 254),
    },
    {
      kind: "a Uint16Array as its bytes",
      data: new Uint16Array(bytes.buffer, 2, 2),
      sent: Buffer.of(2, 253, 254, 255),
    },
    {
      kind: "a DataView",
      data: new DataView(bytes.buffer, 1, 3),
      sent: Buffer.of(1, 2, 253),
    },
  ];
  test.each(payloads)("sends $kind", async ({ data, sent }) => {
    const { sock, peer } = await pair();
    await sock.sendAll(data);
    sock.close();
    expect(await receivedBy(peer)).toEqual(sent);
  });

  const notBytes = [
    { kind: "a Blob", data: new Blob(["x"]) },
    { kind: "a String object", data: new String("x") },
    { kind: "a number", data: 1 },
    { kind: "an array", data: [1] },
    { kind: "undefined", data: undefined },
    { kind: "null", data: null },
  ];
  test.each(notBytes)("rejects $kind before a byte is sent", async ({ data }) => {
    const { sock, peer } = await pair();
    const error = await failure(sock.sendAll(data as string));
    sock.close();
    expect(error).toBeInstanceOf(TypeError);
    expect(error).toMatchObject({ message: `expected a string or bytes, not ${data}` });
    expect(await receivedBy(peer)).toHaveLength(0);
  });

  test("sends 32 MiB to a peer that begins to read late, all of it and nothing twice (short write, partial write)", async () => {
    const { sock, peer } = await pair();
    const data = Buffer.alloc(32 * MiB, "0123456789abcde");
    const sending = sock.sendAll(data.buffer);
    await pollSockets(); // The kernel is full before the peer begins to read.
    const reading = receivedBy(peer);
    await sending;
    sock.close();
    const received = await reading;
    expect(received.equals(data)).toBeTrue();
  });

  test("stays pending until a slow consumer has made room for all of it (backpressure)", async () => {
    const { sock, peer, room } = await pairWithRoom();
    let isDone = false;
    const sending = sock.sendAll("hello").then(() => {
      isDone = true;
    });
    room.make(4);
    await pollSockets();
    expect(isDone).toBeFalse();
    room.make(1);
    await sending;
    sock.close();
    expect(String(await receivedBy(peer))).toBe("hello");
  });

  test("sends in the order of the calls, even of those that wait", async () => {
    const { sock, peer } = await pair();
    const send = (letter: string) => sock.sendAll(Buffer.alloc(8 * MiB, letter));
    const first = send("a");
    const others = [send("b"), send("c")];
    const reading = receivedBy(peer);
    await first;
    others.push(send("d")); // Another one has its turn now, and this one must not overtake it.
    await Promise.all(others);
    sock.close();
    const received = String(await reading);
    expect(received.length).toBe(32 * MiB);
    expect(received.replaceAll(/(.)\1+/g, "$1")).toBe("abcd");
  });

  test("resolves an empty one in its turn, so that it can serve as a flush", async () => {
    const { sock, room } = await pairWithRoom();
    const settled: string[] = [];
    const first = sock.sendAll("hello").then(() => settled.push("hello"));
    const flushed = sock.sendAll("").then(() => settled.push("the empty one"));
    await pollSockets();
    expect(settled).toEqual([]);
    room.make(5);
    await Promise.all([first, flushed]);
    expect(settled).toEqual(["hello", "the empty one"]);
  });

  test("sends at once what the kernel has room for, so a close right after it cuts nothing off", async () => {
    const { sock, peer } = await pair();
    // More than 64 calls: one of them yields to the event loop before it resolves.
    const calls: Promise<void>[] = [];
    for (let i = 0; i < 100; i += 1) calls.push(sock.sendAll("x"));
    sock.close();
    expect(await receivedBy(peer)).toHaveLength(100);
    await Promise.all(calls);
  });

  test("sends what a growable buffer held at the time of the call (SharedArrayBuffer)", async () => {
    const { sock, peer, room } = await pairWithRoom(0.05);
    const first = new SharedArrayBuffer(5, { maxByteLength: 10 });
    const second = new SharedArrayBuffer(5, { maxByteLength: 10 });
    let accepted = 3;
    function growAndAccept(): number {
      first.grow(10); // as a worker may do at any time
      return accepted;
    }
    // The kernel is asked how much it accepts just after `sendAll` has read the length.
    Object.defineProperty(room, "bytes", { get: growAndAccept, set() {} });
    const sending = [sock.sendAll(first), sock.sendAll(second)];
    second.grow(10);
    accepted = 100;
    room.make(accepted);
    await Promise.all(sending);
    sock.close();
    expect(await receivedBy(peer)).toEqual(Buffer.alloc(10));
  });

  const views = [
    { kind: "a Uint8Array", viewOf: (buffer: ArrayBuffer) => new Uint8Array(buffer) },
    { kind: "a DataView", viewOf: (buffer: ArrayBuffer) => new DataView(buffer) },
    { kind: "an ArrayBuffer", viewOf: (buffer: ArrayBuffer) => buffer },
  ];
  test.each(views)("rejects $kind whose buffer was transferred before the call", async (row) => {
    const { sock } = await pair();
    const buffer = new ArrayBuffer(10);
    const data = row.viewOf(buffer);
    structuredClone(buffer, { transfer: [buffer] });
    expect(await failure(sock.sendAll(data))).toBeInstanceOf(TypeError);
  });

  test("rejects if its buffer is transferred while it is being sent", async () => {
    const { sock, peer, room } = await pairWithRoom();
    const data = new ArrayBuffer(10);
    room.bytes = 3;
    const sending = failure(sock.sendAll(data));
    structuredClone(data, { transfer: [data] });
    const reading = streamTo(peer);
    room.make(Infinity);
    expect(await sending).toBeInstanceOf(RangeError);
    sock.close();
    const { ending } = await reading;
    expect(ending).toBe("ECONNRESET"); // A part of it was sent.
  });

  test("rejects if its buffer is transferred while it waits for its turn", async () => {
    const { sock, room } = await pairWithRoom();
    const first = sock.sendAll("hello");
    const data = new ArrayBuffer(10);
    const second = failure(sock.sendAll(data));
    structuredClone(data, { transfer: [data] });
    room.make(Infinity);
    await first;
    expect(await second).toBeInstanceOf(RangeError);
  });

  test("rejects with an error whose stack leads to its own caller, even if it waited for another", async () => {
    const { sock } = await pair(SHORT);
    async function firstCaller(): Promise<void> {
      await sock.sendAll(TOO_MUCH);
    }
    async function secondCaller(): Promise<void> {
      await sock.sendAll("x");
    }
    const first = failure(firstCaller());
    const second = failure(secondCaller());
    expect(((await first) as Error).stack).toContain("firstCaller");
    expect(((await second) as Error).stack).toContain("secondCaller");
  });

  test("rejects again and again after a reset, even if there is nothing to send", async () => {
    const { sock, peer } = await pair();
    peer.resetAndDestroy();
    await once(peer, "close");
    await pollSockets();
    const reset = { code: "ECONNRESET" };
    expect(await failure(sock.sendAll("x"))).toMatchObject(reset);
    expect(await failure(sock.sendAll("x"))).toMatchObject(reset);
    expect(await failure(sock.sendAll(""))).toMatchObject(reset);
  });

  test("rejects if the peer resets while it waits for room", async () => {
    const { sock, peer } = await pair(Infinity);
    const sending = failure(sock.sendAll(TOO_MUCH));
    peer.resetAndDestroy();
    expect(await sending).toMatchObject({ code: "ECONNRESET" });
  });

  test("rejects with EPIPE if the peer ended its stream and then reset the connection", async () => {
    const { sock, peer } = await pair();
    peer.end();
    expect(await sock.recv(1)).toHaveLength(0);
    peer.resetAndDestroy();
    await once(peer, "close");
    expect(await failure(sock.sendAll("x"))).toMatchObject({
      code: "EPIPE",
      message: "broken pipe",
    });
  });

  test("tries once more when its time is up, because Bun does not report small amounts of room", async () => {
    const { sock, peer, room } = await pairWithRoom(0.05);
    const first = sock.sendAll("hello");
    room.bytes = 5;
    await first;
    const start = performance.now();
    const second = failure(sock.sendAll("world"));
    room.bytes = 1;
    expect(await second).toMatchObject({ code: "ETIMEDOUT" });
    // The byte that was accepted restarted the timeout.
    expect(performance.now() - start).toBeGreaterThan(90);
    await until("the peer has received what was sent", () => peer.bytesRead === 6);
  });
});

describe("an interrupted sendAll", () => {
  const afterGap = { code: "EPIPE", message: "an earlier sendAll failed" };

  test("makes later ones reject, so that no line follows a truncated one (broadcast)", async () => {
    const { sock, peer } = await pair(SHORT);
    expect(await failure(sock.sendAll(TOO_MUCH))).toMatchObject({ code: "ETIMEDOUT" });
    const reading = streamTo(peer); // The peer begins to read late.
    expect(await failure(sock.sendAll("the next line"))).toMatchObject(afterGap);
    expect(await failure(sock.sendAll(""))).toMatchObject(afterGap);
    sock.shutdown();
    await untilItStays(() => peer.bytesRead);
    expect(peer.readableEnded).toBeFalse(); // The shutdown has sent no FIN.
    sock.close();
    const { received, ending } = await reading;
    expect(received.equals(TOO_MUCH.subarray(0, received.length))).toBeTrue();
    expect(ending).toBe("ECONNRESET");
  });

  test("ends with a reset if close cuts it off (truncated)", async () => {
    const { sock, peer } = await pair();
    const sending = failure(sock.sendAll(TOO_MUCH));
    const reading = streamTo(peer);
    sock.close();
    expect(await sending).toMatchObject({ code: "EBADF" });
    const { ending } = await reading;
    expect(ending).toBe("ECONNRESET");
  });

  const failures = [
    { by: "a timeout", code: "ETIMEDOUT", stop: () => {} },
    { by: "shutdown", code: "EPIPE", stop: (sock: Connection) => sock.shutdown() },
    { by: "close", code: "EBADF", stop: (sock: Connection) => sock.close() },
  ];
  const parts = [
    { sent: "", ending: "end" },
    { sent: "h", ending: "ECONNRESET" },
    { sent: "hell", ending: "ECONNRESET" },
  ];
  describe.each(failures)("because of $by (truncated),", ({ code, stop }) => {
    test.each(parts)("after '$sent' of 'hello': the peer sees $ending", async (part) => {
      const { sock, peer, room } = await pairWithRoom(SHORT);
      const reading = streamTo(peer);
      room.bytes = part.sent.length;
      const sending = failure(sock.sendAll("hello"));
      await pollSockets(); // What was sent has arrived.
      stop(sock);
      expect(await sending).toMatchObject({ code });
      sock.close();
      expect(await reading).toEqual({ received: Buffer.from(part.sent), ending: part.ending });
    });
  });

  test("leaves the stream intact if no byte was sent, and a later call goes out", async () => {
    const { sock, peer, room } = await pairWithRoom(SHORT);
    expect(await failure(sock.sendAll("hello"))).toMatchObject({ code: "ETIMEDOUT" });
    room.bytes = Infinity;
    await sock.sendAll("world");
    sock.close();
    expect(await streamTo(peer)).toEqual({ received: Buffer.from("world"), ending: "end" });
  });

  test("leaves the stream intact if the rest is sent later (short write, partial write)", async () => {
    const { sock, peer, room } = await pairWithRoom();
    room.bytes = 2;
    const sending = sock.sendAll("hello, ");
    room.make(0); // Bun may report room that is gone again.
    await pollSockets();
    room.make(Infinity);
    await sending;
    await sock.sendAll("world");
    sock.close();
    expect(await streamTo(peer)).toEqual({ received: Buffer.from("hello, world"), ending: "end" });
  });

  test("makes the calls queued behind it reject, even if nothing of it was sent", async () => {
    const { sock, peer, room } = await pairWithRoom(SHORT);
    const reading = streamTo(peer);
    const calls = [sock.sendAll("first"), sock.sendAll("second"), sock.sendAll("third")];
    const errors = await Promise.all(calls.map(failure));
    expect(errors).toMatchObject([{ code: "ETIMEDOUT" }, afterGap, afterGap]);
    room.make(Infinity);
    expect(await failure(sock.sendAll("fourth"))).toMatchObject(afterGap);
    sock.close();
    expect(await reading).toEqual({ received: Buffer.of(), ending: "ECONNRESET" });
  });

  test("makes the calls queued behind it reject, even if it failed because its buffer was transferred", async () => {
    const { sock, room } = await pairWithRoom();
    const first = sock.sendAll("first");
    const data = new ArrayBuffer(10);
    const second = failure(sock.sendAll(data));
    const third = failure(sock.sendAll("third"));
    structuredClone(data, { transfer: [data] });
    room.make(Infinity);
    await first;
    expect(await second).toBeInstanceOf(RangeError);
    expect(await third).toMatchObject(afterGap);
  });

  test("leaves the stream intact if shutdown stops it before a byte is sent", async () => {
    const { sock, peer, room } = await pairWithRoom();
    room.bytes = 5;
    await sock.sendAll("hello");
    const calls = [sock.sendAll("first"), sock.sendAll("second")];
    sock.shutdown();
    const errors = await Promise.all(calls.map(failure));
    expect(errors).toMatchObject([{ code: "EPIPE" }, { code: "EPIPE" }]);
    sock.close();
    expect(await streamTo(peer)).toEqual({ received: Buffer.from("hello"), ending: "end" });
  });

  test("does not affect the one before it if close stops it before its first byte", async () => {
    const { sock, peer, room } = await pairWithRoom();
    room.bytes = 2;
    const first = sock.sendAll("first");
    const second = failure(sock.sendAll("second"));
    room.make(3);
    await first;
    sock.close();
    expect(await second).toMatchObject({ code: "EBADF" });
    expect(await streamTo(peer)).toEqual({ received: Buffer.from("first"), ending: "end" });
  });

  test("does not affect the one before it, which the kernel has accepted but not yet delivered", async () => {
    const { sock, peer } = await pair();
    const reading = streamTo(peer);
    const first = sock.sendAll(TOO_MUCH);
    const second = sock.sendAll("x");
    second.catch(() => {}); // Either it is sent, or the close stops it before its first byte.
    await first;
    sock.close();
    const { received, ending } = await reading;
    expect(received.length).toBeGreaterThanOrEqual(TOO_MUCH.length);
    expect(ending).toBe("end");
  });
});

describe("shutdown", () => {
  test("lets the peer read to the end, and then answer (half-close)", async () => {
    const { sock, peer } = await pair();
    await sock.sendAll("How long is this?");
    sock.shutdown();
    const question = await receivedBy(peer);
    peer.end(`${question.length} bytes`);
    expect(String(await recvAll(sock, 8))).toBe("17 bytes");
    expect(await sock.recv(1)).toHaveLength(0);
  });

  test("makes a pending sendAll reject at once, and every later one", async () => {
    const { sock } = await pair(Infinity);
    const errors: unknown[] = [];
    sock.sendAll(TOO_MUCH).catch((error) => errors.push(error));
    sock.shutdown();
    await pollSockets();
    const broken = {
      name: "SocketError",
      code: "EPIPE",
      message: "this side has called shutdown",
    };
    expect(errors).toMatchObject([broken]);
    expect(await failure(sock.sendAll("x"))).toMatchObject(broken);
    expect(await failure(sock.sendAll(""))).toMatchObject(broken);
  });

  test("leaves a pending recv as it is (half-close)", async () => {
    const { sock, peer } = await pair();
    const receiving = sock.recv(100);
    sock.shutdown();
    expect(await receivedBy(peer)).toHaveLength(0);
    peer.write("hello");
    expect(String(await receiving)).toBe("hello");
  });

  test("may be called again, even after a close", async () => {
    const { sock, peer } = await pair();
    sock.shutdown();
    sock.shutdown();
    peer.end("hello");
    expect(String(await sock.recv(100))).toBe("hello");
    sock.close();
    sock.shutdown();
    expect(await failure(sock.sendAll("x"))).toMatchObject({ code: "EBADF" });
  });

  test("does not hide a reset that a sendAll has hit", async () => {
    const { sock, peer } = await pair();
    peer.write("half an answer");
    expect(String(await sock.recv(4))).toBe("half");
    peer.resetAndDestroy();
    expect(await failure(sock.sendAll("x"))).toMatchObject({ code: "ECONNRESET" });
    sock.shutdown();
    expect(String(await sock.recv(100))).toBe(" an answer");
    expect(await failure(sock.recv(100))).toMatchObject({ code: "ECONNRESET" });
  });

  test("does not hide a reset that comes after it", async () => {
    const { sock, peer } = await pair();
    sock.shutdown();
    peer.resetAndDestroy();
    expect(await failure(sock.recv(100))).toMatchObject({ code: "ECONNRESET" });
  });
});

/** What `close` and `abort` have in common. */
describe.each(["close", "abort"] as const)("%s", (name) => {
  const closed = { name: "SocketError", code: "EBADF", message: "the connection is closed" };

  test.each(receivers)("makes a pending $kind reject at once", async ({ receive }) => {
    const { sock } = await pair(Infinity);
    const errors: unknown[] = [];
    receive(sock, 9).catch((error) => errors.push(error));
    sock[name]();
    await pollSockets();
    expect(errors).toMatchObject([closed]);
  });

  test("makes a pending sendAll reject at once, and those behind it, and every later call", async () => {
    const { sock } = await pair(Infinity);
    const errors: unknown[] = [];
    const calls = [sock.sendAll(TOO_MUCH), sock.sendAll("queued")];
    for (const call of calls) call.catch((error) => errors.push(error));
    sock[name]();
    await pollSockets();
    expect(errors).toMatchObject([closed, closed]);
    expect(await failure(sock.recv(1))).toMatchObject(closed);
    expect(await failure(sock.sendAll("x"))).toMatchObject(closed);
    expect(await failure(sock.sendAll(""))).toMatchObject(closed);
  });

  test("discards what has arrived but was not received", async () => {
    const { sock, peer } = await pair();
    peer.write("hello");
    expect(String(await sock.recv(1))).toBe("h"); // The rest has arrived, too.
    sock[name]();
    expect(await failure(sock.recv(100))).toMatchObject({ code: "EBADF" });
  });

  test("lets the process end, once the peer has closed as well", async () => {
    const { port, accepted } = await peerServer();
    const script = `
      import { connect } from "./tcp_local.ts";
      const sock = await connect("127.0.0.1", ${port});
      await sock.sendAll("hello");
      sock.${name}();
      setTimeout(() => process.exit(3), 3000).unref(); // is not reached if the process can end
    `;
    const running = run(["-e", script]);
    const peer = await accepted;
    await streamTo(peer);
    peer.end();
    expect(await running).toEqual({ status: 0, out: "", err: "" });
  });

  test.skipIf(!HAS_PROC)(
    "leaves no descriptor open if a sendAll has already hit a reset (leak)",
    async () => {
      const before = openSockets(); // Earlier tests have left some, which may close meanwhile.
      const { sock, peer } = await pair(); // `pair` also opens a listener, which stays open.
      peer.write("unread");
      await pollSockets(); // Bun has read that, and reads no more.
      peer.resetAndDestroy();
      expect(await failure(sock.sendAll("x"))).toMatchObject({ code: "ECONNRESET" });
      sock[name]();
      await until("only the listener is left", () => {
        const left = openSockets().filter((socket) => !before.includes(socket));
        return left.length === 1;
      });
    },
  );
});

describe("close", () => {
  test("cuts nothing off if the peer sends a byte before it reads, even if close is called twice (lingering)", async () => {
    const { sock, peer } = await pair();
    const reply = Buffer.alloc(2 * MiB, "reply");
    const begun = await readWhile(peer, sock.sendAll(reply));
    sock.close();
    sock.close();
    peer.write("x"); // A socket that was closed at once would answer this with a reset.
    const rest = await receivedBy(peer);
    expect(Buffer.concat([begun, rest]).equals(reply)).toBeTrue();
  });

  test("cuts nothing off, even if bytes of the peer are unread (lingering)", async () => {
    const { sock, peer } = await pair();
    peer.write(Buffer.alloc(MiB)); // more than Bun reads while nobody asks for it
    await sock.recv(1);
    const reply = Buffer.alloc(256 * 1024, "reply");
    const begun = await readWhile(peer, sock.sendAll(reply));
    sock.close();
    const rest = await receivedBy(peer);
    expect(Buffer.concat([begun, rest]).equals(reply)).toBeTrue();
  });

  test("cuts nothing off when the 4 seconds are over, if the peer reads slowly (lingering)", async () => {
    const { sock, peer } = await pair();
    const reply = Buffer.alloc(2 * MiB, "reply");
    const begun = await readWhile(peer, sock.sendAll(reply));
    using timers = spyOn(globalThis, "setTimeout");
    sock.close();
    const endLingering = timers.mock.calls[0]?.[0] as () => void;
    endLingering(); // The test does not wait that long.
    const rest = await receivedBy(peer);
    expect(Buffer.concat([begun, rest]).equals(reply)).toBeTrue();
  });

  test("discards what arrives after it, even if Bun had paused for a byte that nobody read (lingering)", async () => {
    const { sock, peer } = await pair();
    peer.write("x");
    await pollSockets();
    sock.close();
    peer.end(Buffer.alloc(16 * MiB)); // more than the kernel has room for
    // The peer can only send all of it if this side takes it.
    await once(peer, "finish");
  });

  test("is called by `using` at the end of a block", async () => {
    const { sock, peer } = await pair();
    {
      using closedAtTheEnd = sock;
      await closedAtTheEnd.sendAll("hello");
    }
    expect(String(await receivedBy(peer))).toBe("hello");
    expect(await failure(sock.sendAll("x"))).toMatchObject({ code: "EBADF" });
  });

  test("lingers for at most 4 seconds, even if the peer keeps sending (stall, leak)", async () => {
    const { sock, peer } = await pair();
    using timers = spyOn(globalThis, "setTimeout");
    sock.close();
    peer.write("and another thing");
    await pollSockets();
    expect(timers).toHaveBeenCalledTimes(1);
    const timer = timers.mock.calls[0];
    expect(timer?.[1]).toBe(4000);
    timer?.[0](); // The test does not wait that long.
    peer.write("x"); // This is answered with a reset.
    expect(await failure(once(peer, "close"))).toBeInstanceOf(Error);
  });

  test("does not linger if the peer has already ended its stream", async () => {
    const { sock, peer } = await pair();
    peer.end();
    expect(await sock.recv(1)).toHaveLength(0);
    using timers = spyOn(globalThis, "setTimeout");
    sock.close();
    expect(timers).not.toHaveBeenCalled();
  });

  test("does not linger if a sendAll has already hit a reset", async () => {
    const { sock, peer } = await pair();
    peer.resetAndDestroy();
    expect(await failure(sock.sendAll("x"))).toMatchObject({ code: "ECONNRESET" });
    using timers = spyOn(globalThis, "setTimeout");
    sock.close();
    expect(timers).not.toHaveBeenCalled();
  });
});

describe("abort", () => {
  test("resets the connection, so that the peer does not mistake a truncated reply for a whole one", async () => {
    const { sock, peer } = await pair();
    const reading = streamTo(peer);
    await sock.sendAll("half an answer");
    await pollSockets();
    sock.abort();
    sock.abort(); // A second one does nothing.
    expect(await reading).toEqual({
      received: Buffer.from("half an answer"),
      ending: "ECONNRESET",
    });
  });

  test("stops a peer that is still sending (a download that is no longer wanted)", async () => {
    const { sock, peer } = await pair();
    peer.end(TOO_MUCH);
    await sock.recv(100);
    sock.abort();
    expect(await failure(once(peer, "finish"))).toMatchObject({ code: "ECONNRESET" });
  });

  test.each(["shutdown", "close"] as const)(
    "resets a connection at once, even after %s (lingering)",
    async (name) => {
      const { sock, peer } = await pair();
      await sock.sendAll("hello");
      sock[name]();
      expect(String(await receivedBy(peer))).toBe("hello"); // to the end: it came before the reset
      sock.abort();
      await until("the peer hears of the reset", () => peer.destroyed);
    },
  );
});

describe("timeout", () => {
  test("makes a recv reject if nothing arrives, and what arrives after it is not lost", async () => {
    const { sock, peer } = await pair(SHORT);
    const timedOut = { name: "SocketError", code: "ETIMEDOUT", message: "timed out" };
    expect(await failure(sock.recv(100))).toMatchObject(timedOut);
    peer.write("hello");
    await pollSockets(); // It arrives while no call is pending.
    expect(String(await sock.recv(100))).toBe("hello");
  });

  test("starts again with every byte that is received or sent", async () => {
    const timeout = 0.5;
    async function receiveAll(): Promise<void> {
      const { sock, peer } = await pair(timeout);
      const receiving = recvAll(sock, 6);
      await writeSlowly(peer, "hello!");
      expect(String(await receiving)).toBe("hello!");
    }
    async function receiveUntil(): Promise<void> {
      const { sock, peer } = await pair(timeout);
      const receiving = sock.recvUntil("\n", 100);
      await writeSlowly(peer, "hello\n");
      expect(String(await receiving)).toBe("hello\n");
    }
    async function send(): Promise<void> {
      const { sock, peer } = await pair(timeout);
      const first = sock.sendAll(TOO_MUCH);
      const second = sock.sendAll("x"); // Its time does not begin before its turn.
      await readSlowly(peer, first);
      peer.resume();
      await second;
    }
    async function time(call: () => Promise<void>): Promise<number> {
      const start = performance.now();
      await call();
      return (performance.now() - start) / 1000;
    }
    const times = await Promise.all([receiveAll, receiveUntil, send].map(time));
    for (const seconds of times) expect(seconds).toBeGreaterThan(timeout);
  });

  test("is read when a call begins", async () => {
    const { sock } = await pair(Infinity);
    sock.timeout = SHORT;
    const receiving = failure(sock.recv(1));
    const sending = failure(sock.sendAll(TOO_MUCH));
    sock.timeout = Infinity;
    expect(await receiving).toMatchObject({ code: "ETIMEDOUT" });
    expect(await sending).toMatchObject({ code: "ETIMEDOUT" });
  });

  test("is read when a call begins, even by one that has to wait again", async () => {
    const { sock, peer } = await pair(SHORT);
    const receiving = failure(sock.recvUntil("\n", 100));
    sock.timeout = Infinity;
    peer.write("half a line");
    expect(await receiving).toMatchObject({ code: "ETIMEDOUT" });
  });

  test("is read when a call begins, even by a sendAll that waits for its turn", async () => {
    const { sock, room } = await pairWithRoom(Infinity);
    const first = sock.sendAll("first");
    sock.timeout = SHORT;
    const second = failure(sock.sendAll("second"));
    sock.timeout = Infinity;
    room.make(5);
    await first;
    expect(await second).toMatchObject({ code: "ETIMEDOUT" });
  });

  const counted = [0.02, 1.5, 3600, 2_147_483];
  test.each(counted)("lasts exactly %p seconds", async (timeout) => {
    const { sock, peer } = await pair(timeout);
    using timers = spyOn(globalThis, "setTimeout");
    const receiving = sock.recv(1);
    expect(timers.mock.calls.map(([, milliseconds]) => milliseconds)).toEqual([timeout * 1000]);
    peer.write("x");
    await receiving;
  });

  const tooLong = [2_147_483.9, 2 ** 31]; // A timer counts up to 2,147,483.647 seconds.
  test.each(tooLong)("may be longer than a timer can count: %p seconds", async (timeout) => {
    const { sock, peer } = await pair(timeout);
    const receiving = sock.recv(100);
    await Bun.sleep(10); // A timer that is too long for Bun fires after 1 ms.
    peer.write("hello");
    expect(String(await receiving)).toBe("hello");
  });

  test("does not count the time in which this process was busy", async () => {
    const { sock, peer } = await pair(0.1);
    const { sock: other, peer: caller } = await pair();
    caller.write("?");
    await other.recv(1); // Bun has just handled a socket, so it handles timers next.
    const receiving = recvAll(sock, 16);
    peer.end(MESSAGE);
    const start = performance.now();
    while (performance.now() - start < 200) {
      // The process is busy.
    }
    expect(await receiving).toEqual(MESSAGE);
    expect(await sock.recv(1)).toHaveLength(0);
  });

  const invalid = [0, -1, NaN, "x", "5", undefined] as number[];
  test.each(invalid)(
    "may not be set to %p (zero, negative, not a number), and keeps its value",
    async (timeout) => {
      const { sock } = await pair();
      const assign = () => {
        sock.timeout = timeout;
      };
      expect(assign).toThrow(RangeError);
      expect(assign).toThrow(`timeout must be a number of seconds above 0, not ${timeout}`);
      expect(sock.timeout).toBe(10);
    },
  );
});

describe("a busy connection", () => {
  /** 64 x 65 calls: yielding at every 64th gives 65 turns, and at every 65th only 64. */
  const COUNT = 64 * 65;

  const receiving = receivers.map(({ kind, receive }) => {
    return { kind, call: (sock: Connection) => receive(sock, 1) };
  });
  const kinds = [
    ...receiving,
    { kind: "recvAll of 0 bytes", call: (sock: Connection) => recvAll(sock, 0) },
    { kind: "sendAll", call: (sock: Connection) => sock.sendAll("x") },
    { kind: "recv that rejects", call: (sock: Connection) => failure(sock.recv(1)) },
    { kind: "sendAll that rejects", call: (sock: Connection) => failure(sock.sendAll("x")) },
  ];
  test.each(kinds)(
    "yields to the event loop at every 64th $kind (starvation, fairness)",
    async ({ kind, call }) => {
      const { sock, peer } = await pair();
      peer.write(Buffer.alloc(1 + COUNT));
      await sock.recv(1); // All the rest has arrived, too.
      if (kind.endsWith("rejects")) sock.close();
      let hasTurned = false;
      setImmediate(() => {
        hasTurned = true;
      });
      using turns = spyOn(globalThis, "setImmediate"); // which a call waits for
      for (let i = 0; i < COUNT; i += 1) await call(sock);
      expect(turns).toHaveBeenCalledTimes(65);
      expect(hasTurned).toBeTrue();
    },
  );

  test("yields to the event loop at every 64th recv that is refused (starvation)", async () => {
    const { sock, peer } = await pair();
    const first = sock.recv(1);
    let hasTurned = false;
    setImmediate(() => {
      hasTurned = true;
    });
    using turns = spyOn(globalThis, "setImmediate");
    for (let i = 0; i < COUNT; i += 1) await failure(sock.recv(1));
    expect(turns).toHaveBeenCalledTimes(65);
    expect(hasTurned).toBeTrue();
    peer.write("x");
    expect(String(await first)).toBe("x");
  });

  test("yields at every 64th call of all connections together (starvation)", async () => {
    const socks: Connection[] = [];
    for (let i = 0; i < 20; i += 1) {
      const { sock, peer } = await pair();
      peer.write(Buffer.alloc(1 + COUNT / 20));
      await sock.recv(1);
      socks.push(sock);
    }
    using turns = spyOn(globalThis, "setImmediate");
    for (const sock of socks) {
      for (let i = 0; i < COUNT / 20; i += 1) await sock.recv(1);
    }
    expect(turns).toHaveBeenCalledTimes(65);
  });

  const events = [
    { event: "when the peer begins to read late", happen: (peer: net.Socket) => peer.resume() },
    { event: "when the peer resets", happen: (peer: net.Socket) => peer.resetAndDestroy() },
  ];
  test.each(events)(
    "yields while it works through a long queue of sendAll calls (starvation): $event",
    async ({ happen }) => {
      const { sock, peer } = await pair();
      let inThisTurn = 0;
      let most = 0;
      function count(): void {
        inThisTurn += 1;
        most = Math.max(most, inThisTurn);
      }
      const first = sock.sendAll(TOO_MUCH).catch(() => {});
      const calls: Promise<void>[] = [];
      for (let i = 0; i < COUNT; i += 1) calls.push(sock.sendAll("x").then(count, count));
      happen(peer);
      await first;
      let isDone = false;
      const done = Promise.all(calls).then(() => {
        isDone = true;
      });
      while (!isDone) {
        inThisTurn = 0;
        await new Promise((resolve) => setImmediate(resolve));
      }
      await done;
      expect(most).toBeGreaterThan(0);
      expect(most).toBeLessThanOrEqual(64);
    },
  );
});

describe("a connection", () => {
  test("carries bytes both ways at once, in pieces of any size", async () => {
    const pattern = Uint8Array.from({ length: 251 }, (_, i) => i);
    const data = Buffer.alloc(16 * MiB, pattern);
    const sizes = [1, 16, 1000, 65_536, 1_000_003]; // in rotation

    async function sendPieces(sock: Connection): Promise<void> {
      let start = 0;
      for (let i = 0; start < data.length; i += 1) {
        const piece = data.subarray(start, start + Number(sizes[i % sizes.length]));
        await sock.sendAll(piece);
        start += piece.length;
      }
    }

    async function receivePieces(sock: Connection): Promise<void> {
      let start = 0;
      for (let i = 2; start < data.length; i += 1) {
        const want = data.subarray(start, start + Number(sizes[i % sizes.length]));
        const got = await recvAll(sock, want.length);
        if (!got.equals(want)) {
          throw new Error(`wrong bytes from ${start} to ${start + want.length}`);
        }
        start += want.length;
      }
    }

    const served = Promise.withResolvers<void>();
    const listener = await serving(async (sock) => {
      const both = Promise.all([sendPieces(sock), receivePieces(sock)]);
      await both.then(() => served.resolve(), served.reject);
    });
    using sock = await connect("127.0.0.1", listener.port, 10);
    await Promise.all([sendPieces(sock), receivePieces(sock), served.promise]);
  });

  test.skipIf(!HAS_PROC)(
    "has the addresses of both ends, which print as Python's tuples",
    async () => {
      // On Linux, every address that begins with 127 is this machine's.
      const { port, accepted } = await peerServer("127.0.0.2");
      using sock = await connect("127.0.0.2", port);
      const peer = await accepted;
      const sockname = { host: String(peer.remoteAddress), port: Number(peer.remotePort) };
      expect(sockname.host).toBe("127.0.0.1");
      expect(sock.sockname).toMatchObject(sockname);
      expect(sock.peername).toMatchObject({ host: "127.0.0.2", port });
      expect(`${sock.sockname}`).toBe(`('127.0.0.1', ${sockname.port})`);
      expect(`${sock.peername}`).toBe(`('127.0.0.2', ${port})`);
    },
  );

  test("prints its addresses and its methods, and nothing internal", async () => {
    const { sock } = await pair();
    const printed = Bun.inspect(sock).matchAll(/^  (\S+): /gm);
    expect(Array.from(printed, ([, name]) => name)).toEqual([
      "sockname",
      "peername",
      "timeout",
      "recv",
      "recvUntil",
      "tryRecvAll",
      "sendAll",
      "shutdown",
      "close",
      "abort",
      "[Symbol(Symbol.asyncIterator)]",
      "[Symbol(Symbol.dispose)]",
    ]);
  });

  const waits = [...receivers, { kind: "for await", receive: receiveToTheEnd }];
  test.each(waits)(
    "throws an error whose stack leads to the caller of $kind",
    async ({ receive }) => {
      const { sock } = await pair(SHORT);
      async function callerWhoWaits(): Promise<void> {
        await receive(sock, 1);
      }
      const error = (await failure(callerWhoWaits())) as Error;
      expect(error.stack).toContain("callerWhoWaits");
    },
  );

  test.skipIf(!HAS_PROC)(
    "turns on keep-alive after 60 idle seconds, at either end (NAT)",
    async () => {
      const accepted = Promise.withResolvers<Connection>();
      const listener = await serving(async (sock) => {
        accepted.resolve(sock);
        await sock.recv(1);
      });
      using sock = await connect("127.0.0.1", listener.port);
      for (const { sockname } of [sock, await accepted.promise]) {
        const port = sockname.port.toString(16).toUpperCase().padStart(4, "0");
        // The kernel's list of connections. Timer kind 2 is keep-alive, in hundredths of a second.
        const list = readFileSync("/proc/net/tcp", "latin1");
        const found = new RegExp(`: 0100007F:${port} .* 02:([0-9A-F]{8}) `).exec(list);
        expect(found).not.toBeNull();
        const seconds = parseInt(String(found?.[1]), 16) / 100;
        expect(seconds).toBeGreaterThan(55);
        expect(seconds).toBeLessThan(61);
      }
    },
  );

  const uses = [
    { kind: "while it is open", end: "" },
    { kind: "while it lingers", end: "sock.close();" },
  ];
  test.each(uses)("keeps the process alive $kind", async ({ end }) => {
    const { port, accepted } = await peerServer();
    const script = `
      import { connect } from "./tcp_local.ts";
      const sock = await connect("127.0.0.1", ${port});
      ${end}
      const stillRuns = setTimeout(() => console.log("still runs"), 100);
      stillRuns.unref(); // The process does not wait for it.
    `;
    const running = spawn(["-e", script]);
    const peer = await accepted;
    const line = await linesOf(running.stdout).next();
    expect(line.value).toBe("still runs");
    peer.destroy();
  });

  test("is not kept in memory once it has ended (leak)", async () => {
    const connections: WeakRef<Connection>[] = [];
    const listener = await serving((sock) => {
      connections.push(new WeakRef(sock));
    });
    for (let i = 0; i < 50; i += 1) {
      using sock = await connect("127.0.0.1", listener.port);
      connections.push(new WeakRef(sock));
      await sock.recv(1);
    }
    await until("all but a few are collected", () => {
      Bun.gc(true);
      const kept = connections.filter((connection) => connection.deref() !== undefined);
      return kept.length < 10;
    });
  });

  test("rejects with EHOSTUNREACH when keep-alive finds that the peer has vanished (half-open, dead peer, power failure)", async () => {
    // Keep-alive takes over a minute. The socket is a fake, and the test calls the handler as Bun
    // would.
    const { sock, socket } = fakeConnection();
    const receiving = failure(sock.recv(1));
    const error = Object.assign(new Error("what Bun says about it"), { code: "ETIMEDOUT" });
    void Connection.handlers.close?.(socket, error);
    const vanished = { code: "EHOSTUNREACH", message: "host unreachable" };
    expect(await receiving).toMatchObject(vanished);
    expect(await failure(sock.sendAll("x"))).toMatchObject(vanished);
  });

  test("rejects with ECONNABORTED if Bun closes the socket with an error without a code", async () => {
    // The socket is a fake, because it is not known when Bun does this.
    const { sock, socket } = fakeConnection();
    const receiving = failure(sock.recv(1));
    void Connection.handlers.close?.(socket, new Error("what Bun says about it"));
    const cutOff = { code: "ECONNABORTED", message: "the connection was cut off" };
    expect(await receiving).toMatchObject(cutOff);
    expect(await failure(sock.sendAll("x"))).toMatchObject(cutOff);
  });
});

describe("connect", () => {
  test("rejects with an error that says where and why, and has Bun's error as its cause", async () => {
    const port = await freePort();
    const error = await failure(connect("127.0.0.1", port));
    expect(error).toBeInstanceOf(SocketError);
    expect(error).toMatchObject({
      code: "ECONNREFUSED",
      message: `cannot connect to ('127.0.0.1', ${port}): connection refused or host unreachable`,
      cause: { code: "ECONNREFUSED" },
    });
  });

  test("rejects with an empty code where Bun gives none", async () => {
    using _dialled = refuses("connect", undefined);
    const error = await failure(connect("127.0.0.1", 1));
    expect(error).toMatchObject({
      code: "",
      message: "cannot connect to ('127.0.0.1', 1): what Bun says about it",
    });
  });

  test("names the address that it tried, not the name that it looked up", async () => {
    const port = await freePort();
    using _lookup = lookupFinds(["127.0.0.1"]);
    const error = await failure(connect("name.invalid", port));
    expect(String(error)).toContain(`cannot connect to ('127.0.0.1', ${port}): `);
  });

  test("rejects with an error whose stack leads to its caller, even at the top level of a module", async () => {
    const port = await freePort();
    const script = `
      import { connect } from "./tcp_local.ts";
      await connect("127.0.0.1", ${port});
    `;
    const { status, err } = await run(["-e", script]);
    expect(status).toBe(1);
    expect(err).toMatch(/at connect .*\n +at .*\[eval\]:3:/);
  });

  test("tries each address of a name in turn (several addresses, fallback)", async () => {
    const { port, accepted } = await peerServer();
    using _lookup = lookupFinds(["127.0.0.2", "127.0.0.1"]); // Nobody listens at the first.
    using dialled = spyOn(Bun, "connect");
    using sock = await connect("name.invalid", port);
    await accepted;
    expect(sock.peername.host).toBe("127.0.0.1");
    const hosts = dialled.mock.calls.map(([options]) => "hostname" in options && options.hostname);
    expect(hosts).toEqual(["127.0.0.2", "127.0.0.1"]);
  });

  test("tries the next address after any error, not only after a refusal (fallback)", async () => {
    const { port } = await peerServer();
    using _lookup = lookupFinds(["127.0.0.2", "127.0.0.1"]);
    using dialled = spyOn(Bun, "connect");
    const unreachable = Object.assign(new Error("what Bun says about it"), {
      code: "EHOSTUNREACH",
    });
    dialled.mockRejectedValueOnce(unreachable);
    using sock = await connect("name.invalid", port);
    expect(sock.peername.host).toBe("127.0.0.1");
  });

  test("rejects with the error of the last address of a name", async () => {
    const port = await freePort();
    using _lookup = lookupFinds(["127.0.0.2", "127.0.0.3"]);
    const error = await failure(connect("name.invalid", port));
    expect(error).toMatchObject({
      message: `cannot connect to ('127.0.0.3', ${port}): connection refused or host unreachable`,
    });
  });

  test("looks a name up as Python does: through the system, over IPv4, not IPv6", async () => {
    const port = await freePort();
    using lookup = lookupFinds(["127.0.0.1"]);
    await failure(connect("name.invalid", port));
    expect(lookup.mock.calls).toEqual([["name.invalid", { family: 4, backend: "system" }]]);
  });

  const addresses = ["127.0.0.1", "0.0.0.0", "255.255.255.255"];
  test.each(addresses)("does not look up %p, which is already an address", async (host) => {
    using lookup = lookupFinds([]);
    using dialled = refuses("connect", "ECONNREFUSED");
    await failure(connect(host, 1));
    expect(lookup).not.toHaveBeenCalled();
    expect(dialled.mock.calls[0]?.[0]).toMatchObject({ hostname: host });
  });

  const notDotted = [
    "127.1",
    "127.0.0.1.1",
    " ",
    "127.0.0.01",
    "0x7f.0.0.1",
    "127.0.0.256",
    "127.0.0.-1",
    "127.0.0.1 ",
    "1e-7.0.0.1",
  ];
  test.each(notDotted)("lets the system resolve %p", async (host) => {
    using lookup = lookupFinds(["127.0.0.1"]);
    using dialled = refuses("connect", "ECONNREFUSED");
    await failure(connect(host, 1));
    expect(lookup.mock.calls[0]?.[0]).toBe(host);
    expect(dialled.mock.calls[0]?.[0]).toMatchObject({ hostname: "127.0.0.1" });
  });

  const unknown = [
    { code: "DNS_ENOTFOUND", words: "name or service not known" },
    { code: "DNS_EAI_AGAIN", words: "temporary failure in name resolution" },
    { code: "DNS_EBADFAMILY", words: "address family for hostname not supported" },
    { code: "DNS_NEW", words: "what Bun says about it" },
  ];
  test.each(unknown)("says why a name cannot be resolved: $code", async ({ code, words }) => {
    using lookup = spyOn(Bun.dns, "lookup");
    const cause = Object.assign(new Error("what Bun says about it"), { code });
    lookup.mockRejectedValueOnce(cause);
    const error = await failure(connect("it's\x1b[2J", 1));
    expect(error).toBeInstanceOf(SocketError);
    expect(error).toMatchObject({
      code,
      message: `cannot resolve "it's\\x1b[2J": ${words}`,
      cause,
    });
  });

  test("says that a name is not known if it has no address", async () => {
    using _lookup = lookupFinds([]);
    const error = await failure(connect("name.invalid", 1));
    expect(error).toMatchObject({
      code: "DNS_ENOTFOUND",
      message: "cannot resolve 'name.invalid': name or service not known",
    });
  });

  test("has no timeout by default, and passes a given one on to the connection", async () => {
    const { port } = await peerServer();
    using patient = await connect("127.0.0.1", port);
    using hasty = await connect("127.0.0.1", port, 5);
    expect(patient.timeout).toBe(Infinity);
    expect(hasty.timeout).toBe(5);
  });

  test("counts the lookup towards its timeout, and dials nothing afterwards", async () => {
    const { port } = await peerServer();
    const found = Promise.withResolvers<Bun.DNSLookup[]>();
    using lookup = spyOn(Bun.dns, "lookup");
    using dialled = spyOn(Bun, "connect");
    lookup.mockReturnValueOnce(found.promise);
    expect(await failure(connect("it's\n", port, SHORT))).toMatchObject({
      code: "ETIMEDOUT",
      message: `cannot connect to ("it's\\n", ${port}): timed out`,
    });
    found.resolve([{ address: "127.0.0.1", family: 4, ttl: 0 }]);
    await pollSockets();
    expect(dialled).not.toHaveBeenCalled();
  });

  test("handles a lookup that fails after the timeout", async () => {
    const found = Promise.withResolvers<Bun.DNSLookup[]>();
    using lookup = spyOn(Bun.dns, "lookup");
    lookup.mockReturnValueOnce(found.promise);
    expect(await failure(connect("name.invalid", 1, SHORT))).toMatchObject({ code: "ETIMEDOUT" });
    found.reject(new Error("too late")); // An unhandled rejection would fail this test.
    await pollSockets();
  });

  test("closes a connection that is established after the timeout", async () => {
    const { port, accepted } = await peerServer();
    const late = Promise.withResolvers<void>();
    const connectReally = Bun.connect<Connection>;
    using dialled = spyOn(Bun, "connect");
    dialled.mockImplementation(async (options) => {
      await late.promise;
      const socket = await connectReally(options as Bun.TCPSocketConnectOptions<Connection>);
      return socket as never;
    });
    expect(await failure(connect("127.0.0.1", port, SHORT))).toMatchObject({ code: "ETIMEDOUT" });
    late.resolve();
    const peer = await accepted;
    expect(await receivedBy(peer)).toHaveLength(0); // The stream ends.
  });

  test("tries no other address after the timeout", async () => {
    const late = Promise.withResolvers<never>();
    using _lookup = lookupFinds(["127.0.0.1", "127.0.0.2"]);
    using dialled = spyOn(Bun, "connect");
    dialled.mockReturnValue(late.promise);
    expect(await failure(connect("name.invalid", 1, SHORT))).toMatchObject({ code: "ETIMEDOUT" });
    late.reject(new Error("refused, at last"));
    await pollSockets();
    expect(dialled).toHaveBeenCalledTimes(1);
  });

  test("resolves to a connection without addresses, such as Bun gives after an early reset", async () => {
    // The socket is a fake: no test can reliably reset one so early.
    const socket = { setKeepAlive() {}, pause() {} } as unknown as Socket<Connection>;
    using dialled = spyOn(Bun, "connect");
    dialled.mockImplementation(async (options) => {
      await options.socket.open?.(socket as never);
      return socket as never;
    });
    const sock = await connect("127.0.0.1", 1);
    expect(`${sock.sockname} ${sock.peername}`).toBe("('0.0.0.0', 0) ('0.0.0.0', 0)");
    // What arrived before the reset is received.
    Connection.handlers.data?.(socket, Buffer.from("hello"));
    expect(String(await sock.recv(100))).toBe("hello");
  });
});

/** Wrong arguments, which are rejected without asking Bun. */
describe.each([
  {
    name: "connect",
    call: (host: string, port: number, timeout?: number) => connect(host, port, timeout),
  },
  {
    name: "listen",
    call: (host: string, port: number, timeout?: number) => listen(host, port, () => {}, timeout),
  },
])("$name", ({ call }) => {
  const timeouts = [0, -1, NaN, "x"] as number[];
  test.each(timeouts)("rejects a timeout of %p before it does anything", async (timeout) => {
    using dialled = spyOn(Bun, "connect");
    using bound = spyOn(Bun, "listen");
    const error = await failure(call("127.0.0.1", 0, timeout));
    expect(error).toBeInstanceOf(RangeError);
    expect(error).toMatchObject({
      message: `timeout must be a number of seconds above 0, not ${timeout}`,
    });
    expect(dialled).not.toHaveBeenCalled();
    expect(bound).not.toHaveBeenCalled();
  });

  const ports = [-1, 65_536, 1.5, NaN];
  test.each(ports)("rejects port %p as a wrong argument", async (port) => {
    const error = (await failure(call("127.0.0.1", port))) as Error;
    expect(error).not.toBeInstanceOf(SocketError);
    expect(error.name).toMatch(/^(Range|Type)Error$/);
  });

  const hosts = [undefined, null, 127] as unknown as string[];
  test.each(hosts)("rejects %p as a host", async (host) => {
    const error = await failure(call(host, 0));
    expect(error).toBeInstanceOf(TypeError);
    expect(error).toMatchObject({ message: `host must be a string, not ${host}` });
  });

  test("has no default for the port", async () => {
    const error = await failure(call("127.0.0.1", undefined as unknown as number));
    expect(error).toBeInstanceOf(TypeError);
  });
});

describe("listen", () => {
  const notFunctions = [undefined, {}] as (() => void)[];
  test.each(notFunctions)("rejects %p as `serve`", async (serve) => {
    const error = await failure(listen("127.0.0.1", 0, serve));
    expect(error).toBeInstanceOf(TypeError);
    expect(error).toMatchObject({ message: `serve must be a function, not ${serve}` });
  });

  test("lets `serve` abort before it throws, so that the client sees a reset", async () => {
    const { err } = captured();
    const listener = await serving(async (sock) => {
      await sock.sendAll("half an ans");
      sock.abort();
      throw new EOFError(Buffer.alloc(0), 3);
    });
    using sock = await connect("127.0.0.1", listener.port);
    const error = await failure(recvAll(sock, 14));
    expect(error).toMatchObject({ code: "ECONNRESET" });
    expect(err).toEqual([`${sock.sockname}: socket closed 0 bytes into a 3-byte message`]);
  });

  test("serves a client while another one is silent (stalled client)", async () => {
    const listener = await serving(async (sock) => {
      const message = await sock.recv(100);
      await sock.sendAll(message);
    });
    using _silent = await connect("127.0.0.1", listener.port);
    using sock = await connect("127.0.0.1", listener.port);
    await sock.sendAll("hello");
    expect(String(await sock.recv(100))).toBe("hello");
  });

  test("serves a client while another one pipelines thousands of messages (starvation, fairness)", async () => {
    const count = 20_000;
    let served = 0;
    const listener = await serving(async (sock) => {
      for (;;) {
        const message = await sock.recv(12);
        if (message.length === 0) return;
        await sock.sendAll(message);
        served += 1;
      }
    });
    const { peer } = await peerClient(listener.port);
    peer.write(Buffer.alloc(12 * count));
    peer.resume();
    using sock = await connect("127.0.0.1", listener.port);
    await until("a message is served", () => served > 0);
    await sock.sendAll("hello, world");
    await recvAll(sock, 12);
    expect(served).toBeLessThan(count / 2);
    peer.end();
    await once(peer, "end"); // All have been served.
  });

  const clients = [
    { kind: "to a client", begin: () => {} },
    { kind: "to a client that has half-closed", begin: (sock: Connection) => sock.shutdown() },
  ];
  test.each(clients)(
    "closes a connection when its `serve` is done, but sends all of the reply $kind",
    async ({ begin }) => {
      const reply = Buffer.alloc(16 * MiB, "reply");
      const listener = await serving((sock) => sock.sendAll(reply));
      using sock = await connect("127.0.0.1", listener.port, 10);
      begin(sock);
      const received = await recvAll(sock, reply.length);
      expect(received.equals(reply)).toBeTrue();
      expect(await sock.recv(1)).toHaveLength(0);
    },
  );

  test("closes with `close`, not `abort`, even if `serve` throws: what was sent arrives", async () => {
    captured();
    const listener = await serving(async (sock) => {
      await sock.sendAll("I am sorry");
      throw new Error("a bug");
    });
    const { peer } = await peerClient(listener.port);
    expect(await streamTo(peer)).toEqual({ received: Buffer.from("I am sorry"), ending: "end" });
  });

  test("gives its timeout to each connection, and has none by default", async () => {
    const timeouts: number[] = [];
    const serve = (sock: Connection) => {
      timeouts.push(sock.timeout);
    };
    const patient = await listen("127.0.0.1", 0, serve);
    const hasty = await listen("127.0.0.1", 0, serve, 5);
    cleanups.push(() => patient.stop(true));
    cleanups.push(() => hasty.stop(true));
    using first = await connect("127.0.0.1", patient.port);
    await first.recv(1);
    using second = await connect("127.0.0.1", hasty.port);
    await second.recv(1);
    expect(timeouts).toEqual([Infinity, 5]);
  });

  test("rejects with an error that says where and why, and has Bun's error as its cause", async () => {
    const { port } = await serving(() => {});
    const error = await failure(listen("127.0.0.1", port, () => {}));
    expect(error).toBeInstanceOf(SocketError);
    expect(error).toMatchObject({
      code: "EADDRINUSE",
      message: `cannot listen at ('127.0.0.1', ${port}): address already in use`,
      cause: { code: "EADDRINUSE" },
    });
  });

  test("rejects with an error whose stack leads to its caller, even at the top level of a module", async () => {
    const { port } = await serving(() => {});
    // `127.1` is looked up. Given an address, `listen` would fail before it awaits anything.
    const script = `
      import { listen } from "./tcp_local.ts";
      await listen("127.1", ${port}, () => {});
    `;
    const { status, err } = await run(["-e", script]);
    expect(status).toBe(1);
    expect(err).toMatch(/at listen .*\n +at .*\[eval\]:3:/);
  });

  test("asks for a port that no second server can take (exclusive, Windows)", async () => {
    using bound = spyOn(Bun, "listen");
    await serving(() => {});
    expect(bound.mock.calls[0]?.[0]).toMatchObject({ exclusive: true });
  });

  test("does not look up what is already an address", async () => {
    using lookup = lookupFinds([]);
    const listener = await listen("127.0.0.1", 0, () => {});
    cleanups.push(() => listener.stop(true));
    expect(lookup).not.toHaveBeenCalled();
  });

  test("listens at the first address of a name", async () => {
    using _lookup = lookupFinds(["127.0.0.1", "127.0.0.2"]);
    const listener = await listen("name.invalid", 0, () => {});
    cleanups.push(() => listener.stop(true));
    expect(listener.hostname).toBe("127.0.0.1");
  });

  const ofTheNetwork = [
    {
      error: new EOFError(Buffer.from("abc"), 16),
      says: "socket closed 3 bytes into a 16-byte message",
    },
    { error: new SocketError("ECONNRESET"), says: "connection reset by peer" },
    { error: new SocketError("EBADF"), says: "the connection is closed" },
    { error: new SocketError("EHOSTUNREACH"), says: "host unreachable" },
    { error: new SocketError("EHOSTDOWN"), says: "EHOSTDOWN" },
  ];
  test.each(ofTheNetwork)(
    "says in one line which client failed and why: $says",
    async ({ error, says }) => {
      const { err } = captured();
      const listener = await serving(() => {
        throw error;
      });
      using sock = await connect("127.0.0.1", listener.port);
      expect(await sock.recv(1)).toHaveLength(0);
      expect(err).toEqual([`${sock.sockname}: ${says}`]);
    },
  );

  const bugs = [
    {
      kind: "a TypeError",
      thrown: new TypeError("undefined is not an object"),
      says: import.meta.file,
    },
    { kind: "Buffer's own RangeError", thrown: new RangeError("too much"), says: import.meta.file },
    {
      kind: "the ENOENT of a file",
      thrown: Object.assign(new Error("no such file"), { code: "ENOENT" }),
      says: import.meta.file,
    },
    { kind: "a string", thrown: "oh dear", says: "oh dear" },
    { kind: "an object without a prototype", thrown: Object.create(null), says: "{}" },
    { kind: "undefined", thrown: undefined, says: "undefined" },
  ];
  test.each(bugs)(
    "prints a bug with the client's name and its stack, if any, and keeps serving: $kind",
    async ({ thrown, says }) => {
      const { err } = captured();
      let calls = 0;
      const listener = await serving(async (sock) => {
        calls += 1;
        if (calls === 1) throw thrown;
        await sock.sendAll("hello");
      });
      using sock = await connect("127.0.0.1", listener.port);
      expect(await sock.recv(1)).toHaveLength(0);
      expect(err.join("\n")).toStartWith(`${sock.sockname}: `);
      expect(err.join("\n")).toContain(says);
      using next = await connect("127.0.0.1", listener.port);
      expect(String(await recvAll(next, 5))).toBe("hello");
    },
  );

  const pendingCalls = [
    { name: "recv", call: (sock: Connection) => sock.recv(1) },
    { name: "sendAll", call: (sock: Connection) => sock.sendAll(TOO_MUCH) },
  ];
  test.each(pendingCalls)(
    "makes a pending $name reject when `stop(true)` cuts it off",
    async ({ call }) => {
      const { err } = captured();
      const isWaiting = Promise.withResolvers<void>();
      const listener = await serving(async (sock) => {
        const calling = call(sock);
        isWaiting.resolve();
        await calling;
      });
      using sock = await connect("127.0.0.1", listener.port);
      await isWaiting.promise;
      listener.stop(true);
      await until("the call has rejected", () => err.length === 1);
      expect(err).toEqual([`${sock.sockname}: the connection was cut off`]);
    },
  );

  test("reports a `stop(true)` after a shutdown as the end of the stream", async () => {
    const isWaiting = Promise.withResolvers<void>();
    const received = Promise.withResolvers<Buffer>();
    const listener = await serving(async (sock) => {
      sock.shutdown();
      const receiving = sock.recv(1);
      isWaiting.resolve();
      received.resolve(await receiving);
    });
    using _sock = await connect("127.0.0.1", listener.port);
    await isWaiting.promise;
    listener.stop(true);
    expect(await received.promise).toHaveLength(0);
  });

  test("reports a `stop(true)` as ECONNABORTED if the shutdown cut a sendAll off", async () => {
    const isWaiting = Promise.withResolvers<void>();
    const outcome = Promise.withResolvers<unknown>();
    const listener = await serving(async (sock) => {
      const sending = failure(sock.sendAll(TOO_MUCH));
      sock.shutdown();
      await sending;
      const receiving = failure(sock.recv(1));
      isWaiting.resolve();
      outcome.resolve(await receiving);
    });
    using _sock = await connect("127.0.0.1", listener.port);
    await isWaiting.promise;
    listener.stop(true);
    expect(await outcome.promise).toMatchObject({ code: "ECONNABORTED" });
  });

  test("lets connected clients finish after a `stop()`, and accepts no new ones", async () => {
    const listener = await serving(async (sock) => {
      const message = await sock.recv(100);
      await sock.sendAll(message);
    });
    using sock = await connect("127.0.0.1", listener.port);
    await pollSockets(); // The listener has accepted it.
    listener.stop(false);
    const refused = await failure(connect("127.0.0.1", listener.port));
    expect(refused).toMatchObject({ code: "ECONNREFUSED" });
    await sock.sendAll("hello");
    expect(String(await sock.recv(100))).toBe("hello");
  });

  test("lets recv resolve to what arrived before a `stop(true)`, and then reject", async () => {
    const hasArrived = Promise.withResolvers<void>();
    const isStopped = Promise.withResolvers<void>();
    const outcome = Promise.withResolvers<{ bytes: string; error: unknown }>();
    const listener = await serving(async (sock) => {
      await sock.recv(1); // The rest has arrived, too.
      hasArrived.resolve();
      await isStopped.promise;
      const bytes = await sock.recv(100);
      const error = await failure(sock.recv(100));
      outcome.resolve({ bytes: String(bytes), error });
    });
    using sock = await connect("127.0.0.1", listener.port);
    await sock.sendAll("hello");
    await hasArrived.promise;
    listener.stop(true);
    isStopped.resolve();
    const { bytes, error } = await outcome.promise;
    expect(bytes).toBe("ello");
    expect(error).toMatchObject({ code: "ECONNABORTED" });
    expect(await sock.recv(1)).toHaveLength(0); // For the client, the stream has ended.
  });

  test("receives from 300 clients that reset immediately: first their messages, then the resets", async () => {
    const messages: string[] = [];
    const errors: unknown[] = [];
    const listener = await serving(async (sock) => {
      const message = await recvAll(sock, 16);
      messages.push(String(message));
      const error = await failure(sock.recv(1));
      errors.push(error);
    });
    const script = `
      for (let i = 0; i < 300; i += 1) {
        const socket = await Bun.connect({
          hostname: "127.0.0.1",
          port: ${listener.port},
          socket: { data() {} },
        });
        socket.write("Hi there, server");
        socket.terminate(); // which resets
      }
    `;
    // While this process waits for the other, it accepts nobody.
    const { exitCode } = Bun.spawnSync([process.execPath, "-e", script]);
    expect(exitCode).toBe(0);
    await until("300 clients are served", () => errors.length === 300);
    expect(new Set(messages)).toEqual(new Set(["Hi there, server"]));
    for (const error of errors) expect(error).toMatchObject({ code: "ECONNRESET" });
  });
});

describe("repr", () => {
  test("shows every byte as Python 2 does", () => {
    const everyByte = Uint8Array.from({ length: 256 }, (_, byte) => byte);
    const controls =
      String.raw`\x00\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0b\x0c\r\x0e\x0f` +
      String.raw`\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f`;
    const printable =
      String.raw` !"#$%&\'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_` +
      "`abcdefghijklmnopqrstuvwxyz{|}~";
    const rest = Array.from(everyByte.subarray(127), (byte) => `\\x${byte.toString(16)}`);
    expect(repr(everyByte)).toBe(`'${controls}${printable}${rest.join("")}'`);
  });

  const quoted = [
    { text: "abc", shown: "'abc'" },
    { text: "", shown: "''" },
    { text: "it's", shown: `"it's"` },
    { text: 'say "hi"', shown: `'say "hi"'` },
    { text: `it's "hi"`, shown: String.raw`'it\'s "hi"'` },
    { text: "größer", shown: String.raw`'gr\xc3\xb6\xc3\x9fer'` },
    { text: "it's a \\ \n", shown: String.raw`"it's a \\ \n"` },
  ];
  test.each(quoted)("quotes a string as Python does: $shown", ({ text, shown }) => {
    expect(repr(text)).toBe(shown);
  });
});

describe("the server", () => {
  const messages = [
    { kind: "the client's message", sends: "Hi there, server", says: "'Hi there, server'" },
    {
      kind: "a message that would harm a terminal",
      sends: "it's \x1b[2J\0\n\\ 567",
      says: String.raw`"it's \x1b[2J\x00\n\\ 567"`,
    },
    {
      kind: "a message with 16 MiB after it",
      sends: "Hi there, server".repeat(MiB),
      says: "'Hi there, server'",
    },
  ];
  test.each(messages)("prints what the Python program prints: $kind", async ({ sends, says }) => {
    const { out, err } = captured();
    const port = await programServer();
    const { peer, name } = await peerClient(port);
    // As a blocking client would, this one sends everything before it reads. If the server did not
    // linger, the client would see a reset here, and never the reply.
    peer.end(sends);
    await once(peer, "finish");
    const reply = await receivedBy(peer);
    expect(String(reply)).toBe("Farewell, client");
    expect(out).toEqual([
      `Listening at ('127.0.0.1', ${port})`,
      ...transcript("127.0.0.1", port, name, says),
    ]);
    expect(err).toEqual([]);
  });

  const lengths = [0, 1, 15];
  test.each(lengths)(
    "names a client that ends its stream after %p bytes, and keeps serving",
    async (length) => {
      const { err } = captured();
      const port = await programServer();
      const { peer, name } = await peerClient(port);
      peer.end(MESSAGE.subarray(0, length));
      const reply = await receivedBy(peer);
      expect(reply).toHaveLength(0);
      expect(err).toEqual([`${name}: socket closed ${length} bytes into a 16-byte message`]);
      expect(await exchange(port)).toBe("Farewell, client");
    },
  );

  test.each(lengths)(
    "names a client that resets after %p bytes, and keeps serving",
    async (length) => {
      const { out, err } = captured();
      const port = await programServer();
      const { peer, name } = await peerClient(port);
      peer.write(MESSAGE.subarray(0, length));
      await until("the server has printed three lines", () => out.length === 3);
      peer.resetAndDestroy();
      await until("the server has printed an error", () => err.length === 1);
      expect(err).toEqual([`${name}: connection reset by peer`]);
      expect(await exchange(port)).toBe("Farewell, client");
    },
  );

  test("names a client that resets after its whole message, and keeps serving", async () => {
    const { out, err } = captured();
    const port = await programServer();
    const { peer, name } = await peerClient(port);
    await until("the server has printed three lines", () => out.length === 3);
    peer.write(MESSAGE);
    peer.resetAndDestroy();
    await until("the server has printed an error", () => err.length === 1);
    expect(err).toEqual([`${name}: connection reset by peer`]);
    expect(await exchange(port)).toBe("Farewell, client");
  });

  test("prints the address that it listens at, even if it was given a name", async () => {
    const { out } = captured();
    using _lookup = lookupFinds(["127.0.0.1"]);
    const listener = await program.server("name.invalid", 0);
    cleanups.push(() => listener.stop(true));
    expect(out).toEqual([`Listening at ('127.0.0.1', ${listener.port})`]);
  });

  test("disconnects a client that is silent for its timeout (slowloris)", async () => {
    const { err } = captured();
    const port = await programServer(SHORT);
    const { peer, name } = await peerClient(port);
    const reply = await receivedBy(peer);
    expect(reply).toHaveLength(0);
    expect(err).toEqual([`${name}: timed out`]);
  });

  test("has a timeout of 60 seconds", async () => {
    captured();
    const port = await programServer();
    using timers = spyOn(globalThis, "setTimeout");
    using sock = await connect("127.0.0.1", port);
    await until("the server is waiting", () => timers.mock.calls.length > 0);
    expect(timers.mock.calls.map(([, milliseconds]) => milliseconds)).toEqual([60_000]);
    await sock.sendAll(MESSAGE);
    await recvAll(sock, 16);
  });
});

describe("the client", () => {
  const wholeReplies = [
    { kind: "in one piece", pieces: ["Farewell, client"] },
    { kind: "byte by byte", pieces: [..."Farewell, client"] },
    { kind: "with 16 MiB after it", pieces: ["Farewell, client".repeat(MiB)] },
  ];
  test.each(wholeReplies)(
    "prints what the Python program prints: a reply $kind",
    async ({ pieces }) => {
      const { out, err } = captured();
      const { asking, peer, message } = await programClient();
      expect(message).toBe("Hi there, server");
      for (const piece of pieces) {
        peer.write(piece);
        await pollSockets(); // so that it stays a piece of its own
      }
      await asking;
      expect(out).toEqual([
        `Client has been assigned socket name ('127.0.0.1', ${peer.remotePort})`,
        "The server said 'Farewell, client'",
      ]);
      expect(err).toEqual([]);
    },
  );

  const failures = [
    ...[0, 4, 15].map((length) => ({
      kind: `the server ends its stream after ${length} bytes`,
      answer: (peer: net.Socket) => peer.end("Farewell, client".slice(0, length)),
      message: `socket closed ${length} bytes into a 16-byte message`,
    })),
    {
      kind: "the server resets",
      answer: (peer: net.Socket) => peer.resetAndDestroy(),
      message: "connection reset by peer",
    },
    { kind: "the server is silent for the timeout", answer: () => {}, message: "timed out" },
  ];
  test.each(failures)("fails and closes when $kind: $message", async ({ answer, message }) => {
    captured();
    const { asking, peer } = await programClient(message === "timed out" ? 0.05 : 10);
    answer(peer);
    expect(await failure(asking)).toMatchObject({ message });
    await streamTo(peer);
  });

  test("has a timeout of 60 seconds, to connect and to receive", async () => {
    captured();
    using timers = spyOn(globalThis, "setTimeout");
    const { asking, peer } = await programClient(undefined);
    await pollSockets();
    const milliseconds = timers.mock.calls.map(([, milliseconds]) => milliseconds);
    peer.end("Farewell, client");
    await asking;
    expect(milliseconds).toEqual([60_000, 60_000]);
  });
});

// Another program may hold port 1060 at 127.0.0.1. On Linux, all of 127.0.0.0/8 is this machine's,
// so an address made from the process ID is tried first.
const { pid } = process;
const ownHost = `127.${64 + ((pid >> 16) & 63)}.${(pid >> 8) & 255}.${pid & 255}`;
const host = await firstFreeHost([ownHost, "127.0.0.1"], 1060);

describe("the command line", () => {
  const usage = "usage: tcp_local.ts server|client [host]";
  const wrong = [
    [],
    [""],
    ["foo"],
    ["foo", "bar"],
    ["127.0.0.1"],
    ["Server"],
    ["--help"],
    ["server", "x", "y"],
    ["client", "x", "y"],
    ["server", "server", "server"],
  ];
  test.each(wrong.map((args) => ({ args })))(
    "prints its usage when given $args",
    async ({ args }) => {
      const { out, err } = captured();
      expect(await program.main(args)).toBe(2);
      expect(err).toEqual([usage]);
      expect(out).toEqual([]);
    },
  );

  const hosts = [
    { args: [], hostname: "127.0.0.1" },
    { args: ["127.1"], hostname: "127.0.0.1" },
    { args: ["127.0.0.010"], hostname: "127.0.0.8" }, // Python reads it as octal, too.
    { args: [""], hostname: "0.0.0.0" },
  ];
  test.each(hosts)("server $args listens at $hostname, port 1060", async ({ args, hostname }) => {
    const { err } = captured();
    using bound = refuses("listen", "EADDRINUSE");
    expect(await program.main(["server", ...args])).toBe(1);
    expect(bound.mock.calls[0]?.[0]).toMatchObject({ hostname, port: 1060 });
    expect(err).toEqual([
      `tcp_local.ts: cannot listen at ('${hostname}', 1060): address already in use`,
    ]);
  });

  test.each(hosts)("client $args connects to $hostname, port 1060", async ({ args, hostname }) => {
    const { err } = captured();
    using dialled = refuses("connect", "ECONNREFUSED");
    expect(await program.main(["client", ...args])).toBe(1);
    expect(dialled.mock.calls[0]?.[0]).toMatchObject({ hostname, port: 1060 });
    expect(err).toEqual([
      `tcp_local.ts: cannot connect to ('${hostname}', 1060): connection refused or host unreachable`,
    ]);
  });

  test("gives exit status 0 when the client has its reply (exit code)", async () => {
    captured();
    const port = await programServer();
    const connectReally = Bun.connect<Connection>;
    using dialled = spyOn(Bun, "connect");
    dialled.mockImplementation(async (options) => {
      const elsewhere = { ...options, port } as Bun.TCPSocketConnectOptions<Connection>;
      const socket = await connectReally(elsewhere);
      return socket as never;
    });
    expect(await program.main(["client"])).toBe(0);
  });

  test("gives no status while the server runs", async () => {
    const { out, err } = captured();
    using bound = spyOn(Bun, "listen");
    bound.mockReturnValue({ hostname: "127.0.0.1", port: 1060 } as never);
    let hasReturned = false;
    void program.main(["server"]).then(() => {
      hasReturned = true;
    });
    await until("the server has printed a line", () => out.length > 0);
    await pollSockets();
    expect(out).toEqual(["Listening at ('127.0.0.1', 1060)"]);
    expect(err).toEqual([]);
    expect(hasReturned).toBeFalse();
  });

  test("says that permission is denied where it may not listen", async () => {
    const { err } = captured();
    using _bound = refuses("listen", "EACCES");
    expect(await program.main(["server"])).toBe(1);
    expect(err).toEqual(["tcp_local.ts: cannot listen at ('127.0.0.1', 1060): permission denied"]);
  });

  test("exits with 2 and prints its usage to standard error when it is used incorrectly (exit code, exit status)", async () => {
    expect(await run(["tcp_local.ts"])).toEqual({ status: 2, out: "", err: `${usage}\n` });
  });

  test.skipIf(!HAS_PROC)("runs as a command of its own (shebang)", async () => {
    const directory = temporaryDirectory();
    symlinkSync(process.execPath, join(directory, "bun"));
    const path = `PATH=${directory}:${process.env.PATH}`;
    const { status, err } = await run([path, "./tcp_local.ts"], "env");
    expect({ status, err }).toEqual({ status: 2, err: `${usage}\n` });
  });

  test("exits with 1 and one line on standard error when it fails (exit code, exit status)", async () => {
    // No machine has this address, and listening there sends nothing.
    expect(await run(["tcp_local.ts", "server", "192.0.2.1"])).toEqual({
      status: 1,
      out: "",
      err: "tcp_local.ts: cannot listen at ('192.0.2.1', 1060): address not available\n",
    });
  });

  const signals = ["SIGINT", "SIGTERM"] as const;
  const testOnPort = test.skipIf(host === undefined);
  testOnPort.each(signals)(
    "has a server and a client that talk on port 1060, until %s (Ctrl-C, kill), and can be restarted (TIME_WAIT)",
    async (signal) => {
      const server = spawn(["tcp_local.ts", "server", `${host}`]);
      const out = linesOf(server.stdout);
      expect((await out.next()).value).toBe(`Listening at ('${host}', 1060)`);

      const client = await run(["tcp_local.ts", "client", `${host}`]);
      const name = /\(.*\)/.exec(client.out)?.[0];
      expect(client).toEqual({
        status: 0,
        out: `Client has been assigned socket name ${name}\nThe server said 'Farewell, client'\n`,
        err: "",
      });
      for (const line of transcript(`${host}`, 1060, `${name}`, "'Hi there, server'")) {
        expect((await out.next()).value).toBe(line);
      }

      server.kill(signal);
      await server.exited;
      expect(server.signalCode).toBe(signal);
      expect((await out.next()).done).toBeTrue();

      // The kernel still remembers the connection, which this end was the first to close.
      const restarted = spawn(["tcp_local.ts", "server", `${host}`]);
      const line = await linesOf(restarted.stdout).next();
      expect(line.value).toBe(`Listening at ('${host}', 1060)`);
      restarted.kill(signal);
      await restarted.exited;
    },
  );

  testOnPort("tells a second server in one line that the address is in use", async () => {
    const server = spawn(["tcp_local.ts", "server", `${host}`]);
    const out = linesOf(server.stdout);
    await out.next(); // The first one is listening.
    expect(await run(["tcp_local.ts", "server", `${host}`])).toEqual({
      status: 1,
      out: "",
      err: `tcp_local.ts: cannot listen at ('${host}', 1060): address already in use\n`,
    });
  });

  testOnPort("has a client that exits at once, though its server does not close", async () => {
    const { accepted } = await peerServer(host, 1060);
    const start = performance.now();
    const running = run(["tcp_local.ts", "client", `${host}`]);
    const peer = await accepted;
    peer.write("Farewell, client");
    expect(await running).toMatchObject({ status: 0, err: "" });
    expect(performance.now() - start).toBeLessThan(3500); // Lingering would take 4 seconds.
  });

  testOnPort(
    "has a client that exits with 1 when its server ends the stream early (exit code)",
    async () => {
      const { accepted } = await peerServer(host, 1060);
      const running = run(["tcp_local.ts", "client", `${host}`]);
      const peer = await accepted;
      peer.end("Farewell");
      expect(await running).toMatchObject({
        status: 1,
        err: "tcp_local.ts: socket closed 8 bytes into a 16-byte message\n",
      });
    },
  );

  test("imports no module", () => {
    // Some are missing in older versions of Bun, and each takes time.
    const source = readFileSync(`${import.meta.dir}/tcp_local.ts`, "utf8").replace(/^#!.*/, "");
    const imports = new Bun.Transpiler({ loader: "ts" }).scanImports(source);
    expect(imports).toEqual([]);
  });
});

describe("a bundle", () => {
  const importing = `
    import { connect, listen, recvAll } from "${import.meta.dir}/tcp_local.ts";
    async function main() {
      const listener = await listen("127.0.0.1", 0, (sock) => sock.sendAll("hello"));
      using sock = await connect("127.0.0.1", listener.port);
      const message = await recvAll(sock, 5);
      console.log(String(message));
      listener.stop();
    }
    void main();
  `;
  const formats = [
    ["--format=cjs", "--target=bun"],
    ["--format=iife", "--target=bun"],
    ["--compile", "--bytecode"],
  ].map((options) => ({ options }));

  test.each(formats)("runs a program that imports the file: $options", async ({ options }) => {
    const directory = temporaryDirectory();
    const entry = join(directory, "entry.ts");
    writeFileSync(entry, importing);
    const outcome = await runBundled(entry, join(directory, "bundle"), options);
    expect(outcome).toEqual({ status: 0, out: "hello\n", err: "" });
  });

  test("has the command line if the file itself is compiled", async () => {
    const bundle = join(temporaryDirectory(), "bundle");
    const outcome = await runBundled("tcp_local.ts", bundle, ["--compile", "--bytecode"]);
    const usage = "usage: tcp_local.ts server|client [host]\n";
    expect(outcome).toEqual({ status: 2, out: "", err: usage });
  });
});

describe("the README", () => {
  test("begins with a client that talks to the server", async () => {
    captured();
    const port = await programServer();
    const script = readmeBlock("# tcp_local", "ts").replace("1060", `${port}`);
    expect(script).toContain("// Farewell, client");
    expect(await run(["-e", script])).toEqual({ status: 0, out: "Farewell, client\n", err: "" });
  });

  test("has a server and a client for length-prefixed messages", async () => {
    const script = readmeBlock("Save it as `echo.ts`", "ts");
    const { port, err } = await spawnServer(onFreePort(script));
    const saying = readmeBlock("as `say.ts`", "ts").replace("1061", `${port}`);
    expect(await run(["-e", saying])).toEqual({ status: 0, out: "größer\n", err: "" });

    const polite = await peerClient(port);
    polite.peer.end("\0\0\0\x05first\0\0\0\x06second");
    expect(String(await receivedBy(polite.peer))).toBe("\0\0\0\x05first\0\0\0\x06second");

    const hasty = await peerClient(port);
    hasty.peer.end("\0\0");
    expect(await receivedBy(hasty.peer)).toHaveLength(0);
    // The first line on standard error is this one: the earlier clients were served without an
    // error.
    const line = `${hasty.name}: socket closed 2 bytes into a 4-byte message`;
    expect((await err.next()).value).toBe(line);

    const greedy = await peerClient(port);
    greedy.peer.write("\0\x01\0\x01");
    expect(await receivedBy(greedy.peer)).toHaveLength(0);
    const reason = "a message of 65537 bytes is too long";
    expect((await err.next()).value).toBe(`${greedy.name}: ${reason}`);
  });

  const responses = [
    { kind: "a whole response", response: "Content-Length: 5\r\n\r\nhello!", says: "hello\n" },
    { kind: "a header that is cut off", response: "Content-Len", says: "too long, or cut off" },
    { kind: "a body that is cut off", response: "Content-Length: 5\r\n\r\nhel", says: "3 bytes" },
    { kind: "no length", response: "\r\nhello", says: "missing, or too large" },
    { kind: "an excessive length", response: "Content-Length: 1000001\r\n\r\n", says: "too large" },
  ];
  test.each(responses)("reads lines and then bytes: $kind", async ({ response, says }) => {
    const { port, accepted } = await peerServer();
    const script = readmeBlock("### Lines, and then bytes", "ts").replace("8000", `${port}`);
    const running = run(["-e", script]);
    const peer = await accepted;
    peer.end(`HTTP/1.1 200 OK\r\n${response}`);
    const { out, err } = await running;
    expect(out + err).toContain(says);
  });

  test("has a server and a client that read to the end of the stream (half-close)", async () => {
    const script = readmeBlock("### To the end of the stream", "ts");
    const { port } = await spawnServer(onFreePort(script));
    const asking = readmeBlock("still receives the answer", "ts").replace("1062", `${port}`);
    expect(await run(["-e", asking])).toEqual({ status: 0, out: "17 bytes\n", err: "" });
  });

  test("has a proxy that passes on the end of either stream (half-close)", async () => {
    const { port: upstream, accepted } = await peerServer();
    const script = readmeBlock("### A proxy", "ts").replace("8000", `${upstream}`);
    const { port } = await spawnServer(onFreePort(script));
    const { peer: client } = await peerClient(port);
    const server = await accepted;
    client.end("a question");
    expect(String(await receivedBy(server))).toBe("a question");
    server.end("an answer");
    expect(String(await receivedBy(client))).toBe("an answer");
  });

  test("has a proxy without a timeout, in which one side may be idle", async () => {
    const { port: upstream } = await peerServer();
    const script = readmeBlock("### A proxy", "ts").replace("8000", `${upstream}`);
    const telling = script.replace("await Promise.all", "console.log(server.timeout);\n$&");
    const { port, out } = await spawnServer(onFreePort(telling));
    await peerClient(port);
    expect((await out.next()).value).toBe("Infinity");
  });

  test.each(["client", "server"])("has a proxy that passes on a reset of the %s", async (name) => {
    const { port: upstream, accepted } = await peerServer();
    const script = readmeBlock("### A proxy", "ts").replace("8000", `${upstream}`);
    const { port } = await spawnServer(onFreePort(script));
    const { peer: client } = await peerClient(port);
    const server = await accepted;
    const first = name === "client" ? client : server;
    const second = name === "client" ? server : client;
    first.write("half a message");
    await once(second, "readable");
    first.resetAndDestroy();
    const { ending } = await streamTo(second);
    expect(ending).toBe("ECONNRESET");
  });

  test("has a proxy that resets its client if it cannot connect to the server", async () => {
    const upstream = await freePort();
    const script = readmeBlock("### A proxy", "ts").replace("8000", `${upstream}`);
    const { port } = await spawnServer(onFreePort(script));
    const client = net.connect({ port, host: "127.0.0.1" });
    cleanups.push(() => client.destroy());
    let code = "";
    // The reset may come so early that it is the error of the connect.
    client.on("error", (error: NodeJS.ErrnoException) => {
      code = String(error.code);
    });
    client.resume();
    await until("the client is reset", () => code !== "");
    expect(code).toBe("ECONNRESET");
  });

  test("has a chat that drops a slow consumer, and no other client (broadcast)", async () => {
    const { port, err } = await spawnServer(onFreePort(readmeBlock("### Many clients", "ts")));
    const stuck = await peerClient(port);
    const reader = await peerClient(port);
    const writer = await peerClient(port);
    const received: Buffer[] = [];
    reader.peer.on("data", (bytes: Buffer) => received.push(bytes));
    writer.peer.resume();
    let dropped = "";
    const firstError = err.next().then(({ value }) => {
      dropped = String(value);
    });
    const sent: Buffer[] = [];
    for (let batch = 0; dropped === ""; batch += 1) {
      const lines = Buffer.from(`${batch} `.padEnd(999, "x").concat("\n").repeat(1000));
      sent.push(lines);
      writer.peer.write(lines);
      const length = sent.length * lines.length;
      await until("the reader has the lines", () => Buffer.concat(received).length === length);
    }
    await firstError;
    expect(dropped).toBe(`${stuck.name}: the connection is closed`);
    const all = Buffer.concat(sent);
    expect(Buffer.concat(received).equals(all)).toBeTrue();
    const { received: part, ending } = await streamTo(stuck.peer);
    expect(ending).toBe("ECONNRESET");
    expect(part.equals(all.subarray(0, part.length))).toBeTrue();
  });

  test("has a chat that stops on SIGTERM, and first sends what is queued", async () => {
    const { server, slow, writer, sent, heard } = await chatWithQueue();
    server.kill("SIGTERM");
    await until("the writer has its goodbye", () => heard() === sent + "Goodbye\n".length);
    writer.end();
    slow.end("too late\n".repeat(50)); // Its own goodbye is still queued.
    await pollSockets();
    const received = await receivedBy(slow);
    expect(received.length).toBe(sent + "Goodbye\n".length);
    expect(received.toString("latin1", sent)).toBe("Goodbye\n");
    expect(await server.exited).toBe(0);
  });

  test("has a chat that stops on SIGTERM even if a client is stuck (stalled)", async () => {
    const { server, writer } = await chatWithQueue(50);
    server.kill("SIGTERM");
    writer.end();
    await until("the chat has ended", () => server.exitCode !== null);
    expect(server.exitCode).toBe(0);
  });

  test("has a chat that sends what is queued to a client that ends its stream (half-close)", async () => {
    const { slow, writer, sent } = await chatWithQueue();
    slow.end("I must go\n");
    const [farewell] = await once(writer, "data");
    expect(String(farewell)).toBe("I must go\n");
    const received = await receivedBy(slow);
    expect(received.toString("latin1", sent)).toBe("I must go\nGoodbye\n");
  });
});

describe.skipIf(!HAS_PROC)("under load", () => {
  test("a server does not hold the 32 MiB that follow a message", async () => {
    const { server, port } = await spawnServer(SERVER);
    await exchange(port);
    const before = peakMemory(server.pid);
    for (const length of [15, 16, 17]) {
      const { peer: flood } = await peerClient(port);
      flood.write(Buffer.alloc(length));
      flood.end(Buffer.alloc(32 * MiB));
      await once(flood, "finish"); // The server has discarded it.
      expect(String(await receivedBy(flood))).toBe("Farewell, client");
      flood.destroy();
    }
    expect(await exchange(port)).toBe("Farewell, client");
    expect(peakMemory(server.pid) - before).toBeLessThan(48 * MiB);
  });

  test("a server that does not read buffers about 512 KiB for each of 100 floods (backpressure)", async () => {
    const script = `
      import { listen } from "./tcp_local.ts";
      const listener = await listen("127.0.0.1", 0, async (sock) => {
        await sock.sendAll("welcome");
        await new Promise(() => {}); // It does not read.
      });
      console.log(listener.port);
    `;
    const { server, port } = await spawnServer(script);
    const before = peakMemory(server.pid);
    const flood = Buffer.alloc(16 * MiB);
    for (let i = 0; i < 100; i += 1) {
      const full = Promise.withResolvers<void>();
      const socket = await Bun.connect({
        hostname: "127.0.0.1",
        port,
        socket: {
          data(socket) {
            socket.write(flood);
            full.resolve(); // That was more than the kernel has room for.
          },
          drain(socket) {
            socket.write(flood);
          },
        },
      });
      cleanups.push(() => socket.terminate());
      await full.promise;
    }
    using last = await connect("127.0.0.1", port);
    await recvAll(last, 7); // By now the server has looked at each of the others.
    expect(peakMemory(server.pid) - before).toBeLessThan(64 * MiB);
  });

  test("a server survives 200 clients that reset and 200 that stall, without a leak of memory or descriptors", async () => {
    const { server, port, out } = await spawnServer(SERVER);
    const printing = Array.fromAsync(out); // A pipe that nobody reads would fill up.
    await exchange(port);
    const memory = peakMemory(server.pid);
    const descriptors = countDescriptors(server.pid);
    for (let i = 0; i < 200; i += 1) {
      const { peer } = await peerClient(port);
      peer.write(MESSAGE.subarray(0, i % 17));
      if (i % 3 === 0) await exchange(port);
      peer.resetAndDestroy();
    }
    const stalled: net.Socket[] = [];
    for (let i = 0; i < 200; i += 1) {
      const { peer } = await peerClient(port);
      peer.write("Hi ther");
      stalled.push(peer);
    }
    expect(await exchange(port)).toBe("Farewell, client");
    for (const peer of stalled.slice(100)) {
      peer.write("e, server");
      expect(String(await receivedBy(peer))).toBe("Farewell, client");
    }
    for (const peer of stalled) peer.destroy();
    let leaked = Infinity;
    for (let i = 0; i < 1000 && leaked > 0; i += 1) {
      await exchange(port);
      leaked = countDescriptors(server.pid) - descriptors;
    }
    expect(leaked).toBeLessThanOrEqual(0);
    expect(peakMemory(server.pid) - memory).toBeLessThan(32 * MiB);

    server.kill();
    const lines = await printing;
    const kinds = lines.map((line) => line.replaceAll(/\('[0-9.]+', \d+\)/g, "*"));
    expect(new Set(kinds)).toEqual(
      new Set([
        "We have accepted a connection from *",
        "Socket connects * and *",
        "The incoming sixteen-octet message says 'Hi there, server'",
        "Reply sent, socket closed",
        "Listening at *",
      ]),
    );
  });
});

// ---- Helpers ------------------------------------------------------------------------------------

/** What to run after each test, however it ends. */
const cleanups: (() => unknown)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups) await cleanup();
  cleanups.length = 0;
});

/** A connection, with a timeout in seconds, and the other end of it. */
async function pair(timeout = 10): Promise<{ sock: Connection; peer: net.Socket }> {
  const { port, accepted } = await peerServer();
  const sock = await connect("127.0.0.1", port);
  sock.timeout = timeout; // not for `connect`, which a short one could make fail
  const peer = await accepted;
  cleanups.push(() => sock.close());
  return { sock, peer };
}

/** A connection whose socket is a fake. The test calls `Connection.handlers` as Bun would. */
function fakeConnection(): { sock: Connection; socket: Socket<Connection> } {
  const socket = { setKeepAlive() {}, pause() {}, resume() {} } as unknown as Socket<Connection>;
  const sock = new Connection(socket, Infinity);
  socket.data = sock;
  return { sock, socket };
}

/** How much the kernel accepts of what a connection sends. At first, it accepts nothing. */
interface Room {
  /** How many more bytes it accepts. If a test assigns to it, Bun does not report that room. */
  bytes: number;
  /** Makes room for that many bytes, and has Bun report it, as it does when there is plenty. */
  make(bytes: number): void;
}

/** A `pair` whose test says how much the kernel accepts. What it accepts goes over real sockets. */
async function pairWithRoom(
  timeout?: number,
): Promise<{ sock: Connection; peer: net.Socket; room: Room }> {
  using dialled = spyOn(Bun, "connect");
  const { sock, peer } = await pair(timeout);
  const socket = (await dialled.mock.results[0]?.value) as Socket<Connection>;
  const room: Room = {
    bytes: 0,
    make(bytes) {
      room.bytes = bytes;
      void Connection.handlers.drain?.(socket);
    },
  };
  const write = socket.write.bind(socket) as (data: Buffer, start: number, count: number) => number;
  socket.write = ((data: Buffer, start: number, count: number) => {
    const accepted = Math.min(count, room.bytes);
    room.bytes -= accepted;
    return accepted === 0 ? 0 : write(data, start, accepted);
  }) as typeof socket.write;
  return { sock, peer, room };
}

/** A fake server, and the first client that it accepts. */
async function peerServer(
  hostname = "127.0.0.1",
  port = 0,
): Promise<{ port: number; accepted: Promise<net.Socket> }> {
  const listener = net.createServer({ allowHalfOpen: true });
  listener.listen(port, hostname);
  await once(listener, "listening");
  cleanups.push(() => listener.close());
  const { promise: accepted, resolve } = Promise.withResolvers<net.Socket>();
  listener.on("connection", (peer) => {
    peer.on("error", () => {}); // so that a test need not listen for it
    cleanups.push(() => peer.destroy());
    resolve(peer);
  });
  const address = listener.address() as net.AddressInfo;
  return { port: address.port, accepted };
}

/** A fake client, and its address as the program prints it. */
async function peerClient(port: number): Promise<{ peer: net.Socket; name: string }> {
  const peer = net.connect({ port, host: "127.0.0.1", allowHalfOpen: true });
  peer.on("error", () => {});
  cleanups.push(() => peer.destroy());
  await once(peer, "connect");
  return { peer, name: `('127.0.0.1', ${peer.localPort})` };
}

/** Writes a byte every tenth of a second. */
async function writeSlowly(peer: net.Socket, text: string): Promise<void> {
  for (const byte of Buffer.from(text)) {
    await Bun.sleep(100);
    peer.write(Buffer.of(byte));
  }
}

/** Reads until `sending` is done, and pauses for a tenth of a second now and then, six times. */
async function readSlowly(peer: net.Socket, sending: Promise<void>): Promise<void> {
  let received = 0;
  let pauses = 0;
  await readWhile(peer, sending, async (bytes) => {
    received += bytes.length;
    const isPauseDue = pauses < 6 && received > pauses * 4 * MiB;
    if (!isPauseDue) return;
    pauses += 1;
    await Bun.sleep(100);
  });
}

/**
 * Reads from `peer`, which makes room, until `sending` is done. Resolves to all that was read. Each
 * piece also goes to `onBytes`.
 */
async function readWhile(
  peer: net.Socket,
  sending: Promise<void>,
  onBytes: (bytes: Buffer) => void | Promise<void> = () => {},
): Promise<Buffer> {
  const pieces: Buffer[] = [];
  let isSending = true;
  const done = sending.finally(() => {
    isSending = false;
  });
  await pollSockets();
  while (isSending) {
    const bytes: Buffer | null = peer.read();
    if (bytes !== null) {
      pieces.push(bytes);
      await onBytes(bytes);
    }
    await pollSockets();
  }
  await done;
  return Buffer.concat(pieces);
}

/** All that `peer` receives to the end of its stream, which must be a clean one. */
async function receivedBy(peer: net.Socket): Promise<Buffer> {
  const { received, ending } = await streamTo(peer);
  if (ending !== "end") throw new Error(`${ending} after ${received.length} bytes`);
  return received;
}

/** All that `peer` receives, and how its stream ends: with "end", or with the code of an error. */
async function streamTo(peer: net.Socket): Promise<{ received: Buffer; ending: string }> {
  const pieces: Buffer[] = [];
  peer.on("data", (bytes: Buffer) => pieces.push(bytes));
  await until("the peer's stream ends", () => peer.readableEnded || peer.destroyed);
  const error = peer.errored as NodeJS.ErrnoException | null;
  const ending = error === null ? "end" : String(error.code);
  return { received: Buffer.concat(pieces), ending };
}

/** A listener of tcp_local.ts on a free port, with a timeout in seconds. */
async function serving(
  serve: (sock: Connection) => unknown,
  timeout = 10,
): Promise<{ port: number; stop(force?: boolean): void }> {
  const listener = await listen("127.0.0.1", 0, serve, timeout);
  cleanups.push(() => listener.stop());
  return listener;
}

/** The port of the program's server, in this process. */
async function programServer(timeout?: number): Promise<number> {
  const listener = await program.server("127.0.0.1", 0, timeout);
  cleanups.push(() => listener.stop(true));
  return listener.port;
}

/** The program's client in this process, a fake server, and the message that it has received. */
async function programClient(
  timeout?: number,
): Promise<{ asking: Promise<void>; peer: net.Socket; message: string }> {
  const { port, accepted } = await peerServer();
  const asking = program.client("127.0.0.1", port, timeout);
  asking.catch(() => {}); // It may fail before the test awaits it.
  const peer = await accepted;
  const received = await once(peer, "data");
  return { asking, peer, message: String(received[0]) };
}

/** What the server replies to a whole message. */
async function exchange(port: number): Promise<string> {
  const { peer } = await peerClient(port);
  peer.write(MESSAGE);
  const reply = await receivedBy(peer);
  peer.destroy();
  return String(reply);
}

/** What the Python program prints for one client. */
function transcript(host: string, port: number, client: string, message: string): string[] {
  return [
    `We have accepted a connection from ${client}`,
    `Socket connects ('${host}', ${port}) and ${client}`,
    `The incoming sixteen-octet message says ${message}`,
    "Reply sent, socket closed",
    `Listening at ('${host}', ${port})`,
  ];
}

/**
 * What `promise` rejects with, within 10 seconds. If it may reject while the test awaits something
 * else, call this first: it handles the rejection.
 */
async function failure(promise: Promise<unknown>): Promise<unknown> {
  const deadline = Bun.sleep(10_000).then(() => "is still pending after 10 seconds");
  const outcome = promise.then((value) => `resolved to ${Bun.inspect(value).slice(0, 200)}`);
  let found: string;
  try {
    found = await Promise.race([outcome, deadline]);
  } catch (error) {
    return error;
  }
  throw new Error(`expected a rejection, but it ${found}`);
}

/** Resolves when Bun has looked at all sockets. It does so between two immediates. */
async function pollSockets(): Promise<void> {
  await new Promise((resolve) => setImmediate(resolve));
  await new Promise((resolve) => setImmediate(resolve));
}

/**
 * Resolves when `condition` holds. After 10 seconds, it rejects and says what it was waiting for.
 */
async function until(words: string, condition: () => boolean): Promise<void> {
  const deadline = performance.now() + 10_000;
  while (!condition()) {
    if (performance.now() > deadline) {
      throw new Error(`gave up after 10 seconds of waiting until ${words}`);
    }
    await pollSockets();
  }
}

async function receiveToTheEnd(sock: Connection): Promise<void> {
  for await (const bytes of sock) expect(bytes).not.toHaveLength(0);
}

/** Resolves when `value` has not changed for 100 turns of the event loop. */
async function untilItStays(value: () => number): Promise<void> {
  let before: number;
  do {
    before = value();
    for (let i = 0; i < 100; i += 1) await pollSockets();
  } while (value() !== before);
}

/** The processor time that this process has used, in seconds. Other processes do not matter. */
function processorTime(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1_000_000;
}

/** A port on which nobody listens. A connection holds it, so no other process can get it. */
async function freePort(): Promise<number> {
  const { sock } = await pair();
  return sock.sockname.port;
}

/** The first of `hosts` on which nobody listens at `port`. */
async function firstFreeHost(hosts: string[], port: number): Promise<string | undefined> {
  for (const host of hosts) {
    try {
      const listener = await listen(host, port, () => {});
      listener.stop(true);
      return host;
    } catch {
      // It is taken, or this machine has no such address.
    }
  }
  return undefined;
}

/** Makes every lookup find `addresses`. Declare it with `using`. */
function lookupFinds(addresses: string[]) {
  const lookup = spyOn(Bun.dns, "lookup");
  const found = addresses.map((address) => ({ address, family: 4 as const, ttl: 0 }));
  lookup.mockResolvedValue(found);
  return lookup;
}

/** Makes `Bun.listen` or `Bun.connect` fail. Declare it with `using`. */
function refuses(name: "listen" | "connect", code: string | undefined) {
  const spy = spyOn(Bun, name);
  spy.mockImplementation(() => {
    throw Object.assign(new Error("what Bun says about it"), { code });
  });
  return spy;
}

/** Captures what the console prints until the test ends, line by line. */
function captured(): { out: string[]; err: string[] } {
  const out: string[] = [];
  const err: string[] = [];
  const log = spyOn(console, "log");
  log.mockImplementation((...parts) => {
    out.push(format(...parts));
  });
  const error = spyOn(console, "error");
  error.mockImplementation((...parts) => {
    err.push(format(...parts));
  });
  cleanups.push(() => log.mockRestore());
  cleanups.push(() => error.mockRestore());
  return { out, err };
}

/** Starts Bun, or another program, as a process of its own, which is killed after the test. */
function spawn(args: string[], executable = process.execPath) {
  const command = [executable, ...args];
  const started = Bun.spawn(command, { cwd: import.meta.dir, stdout: "pipe", stderr: "pipe" });
  cleanups.push(() => {
    started.kill("SIGKILL");
    return started.exited; // After that, its port is free.
  });
  return started;
}

type Outcome = { status: number; out: string; err: string };

/** The exit status of a process of Bun, or of another program, and what it prints. */
async function run(args: string[], executable?: string): Promise<Outcome> {
  const started = spawn(args, executable);
  const out = await new Response(started.stdout).text();
  const err = await new Response(started.stderr).text();
  const status = await started.exited;
  return { status, out, err };
}

/**
 * Starts a script that prints the port it listens on at the end of its first line. If it crashes,
 * prints why after the test.
 */
async function spawnServer(script: string) {
  const server = spawn(["-e", script]);
  const out = linesOf(server.stdout);
  const err = linesOf(server.stderr);
  cleanups.push(async () => {
    const hasCrashed = server.exitCode !== null && server.exitCode !== 0;
    if (!hasCrashed) return;
    for await (const line of err) console.error(line);
  });
  const { value: line } = await out.next();
  const port = Number(/(\d+)\)?$/.exec(`${line}`)?.[1]);
  return { server, port, out, err };
}

/** Bundles a program with `bun build`, and runs the bundle. */
async function runBundled(entry: string, bundle: string, options: string[]): Promise<Outcome> {
  const built = await run(["build", ...options, entry, `--outfile=${bundle}`]);
  if (built.status !== 0) return built;
  const isExecutable = options.includes("--compile");
  return run(isExecutable ? [] : [bundle], isExecutable ? bundle : process.execPath);
}

/** A directory that is removed after the test. */
function temporaryDirectory(): string {
  const directory = mkdtempSync(join(tmpdir(), "tcp_local-"));
  cleanups.push(() => rmSync(directory, { recursive: true }));
  return directory;
}

/** The lines of a stream, each as soon as it arrives. */
async function* linesOf(stream: ReadableStream<Uint8Array>): AsyncGenerator<string, void> {
  let text = "";
  for await (const bytes of stream) {
    text += Buffer.from(bytes).toString("latin1");
    const lines = text.split("\n");
    text = lines.pop() ?? "";
    yield* lines;
  }
}

/** A socket whose `recv` gives the `pieces`, one per call, and records what it was asked for. */
function scripted(pieces: Buffer[]): { recv(maxLength: number): Promise<Buffer>; asked: number[] } {
  const asked: number[] = [];
  async function recv(maxLength: number): Promise<Buffer> {
    asked.push(maxLength);
    return pieces.shift() ?? Buffer.alloc(0);
  }
  return { recv, asked };
}

/** `bytes` in pieces: one ends after each byte whose bit is set in `cuts`. */
function cut(bytes: Buffer, cuts: number): Buffer[] {
  const pieces: Buffer[] = [];
  let start = 0;
  for (let end = 1; end <= bytes.length; end += 1) {
    const isCut = end === bytes.length || (cuts & (1 << (end - 1))) !== 0;
    if (!isCut) continue;
    pieces.push(bytes.subarray(start, end));
    start = end;
  }
  return pieces;
}

/** The program's server on a free port, as a script for another process. */
const SERVER = `
  import { server } from "./tcp_local.ts";
  await server("127.0.0.1", 0);
`;

/** A script from the README, changed to listen on a free port and to print it. */
function onFreePort(script: string): string {
  const call = /(const listener = )?await listen\("127\.0\.0\.1", \d+/;
  const listening = script.replace(call, 'const listener = await listen("127.0.0.1", 0');
  return `${listening}\nconsole.log(listener.port);\n`;
}

/**
 * The README's chat in a process of its own. `slow` does not read: 100 lines are queued for it. The
 * chat waits for it for `patience` milliseconds when it says goodbye.
 */
async function chatWithQueue(patience = 5000) {
  const script = readmeBlock("### Many clients", "ts").replace("5_000", `${patience}`);
  const chat = onFreePort(script);
  const stop = readmeBlock("### Stop on SIGTERM", "ts");
  const tellLongestQueue = `
    process.on("SIGUSR2", () => {
      console.log(Math.max(...Array.from(clients, (client) => client.queued)));
    });
  `;
  const { server, port, out } = await spawnServer(chat + stop + tellLongestQueue);
  const { peer: slow } = await peerClient(port);
  const { peer: writer } = await peerClient(port);
  let heard = 0;
  writer.on("data", (bytes: Buffer) => {
    heard += bytes.length;
  });
  const lines = "x".repeat(999).concat("\n").repeat(50);
  let sent = 0;
  let queued = 0;
  while (queued < 100) {
    writer.write(lines);
    sent += lines.length;
    await until("the writer has its own lines", () => heard === sent);
    server.kill("SIGUSR2");
    const line = await out.next();
    queued = Number(line.value);
  }
  return { server, slow, writer, sent, heard: () => heard };
}

/** The README's first code block in `language` after the text `words`. */
function readmeBlock(words: string, language: string): string {
  const readme = readFileSync(`${import.meta.dir}/README.md`, "utf8");
  const start = readme.indexOf(words);
  const fenced = new RegExp(`^\`\`\`${language}\\n(.*?)^\`\`\`$`, "ms");
  const block = fenced.exec(readme.slice(start))?.[1];
  if (start < 0 || block === undefined) throw new Error(`nothing after ${words} in the README`);
  return block;
}

/** The most memory that a process has held so far, in bytes. */
function peakMemory(pid: number): number {
  const status = readFileSync(`/proc/${pid}/status`, "latin1");
  const kibibytes = /VmHWM:\s+(\d+)/.exec(status)?.[1];
  return Number(kibibytes) * 1024;
}

/** The sockets that this process has open, as the kernel names them. */
function openSockets(): string[] {
  const directory = "/proc/self/fd";
  const sockets: string[] = [];
  for (const descriptor of readdirSync(directory)) {
    try {
      const name = readlinkSync(join(directory, descriptor));
      if (name.startsWith("socket:")) sockets.push(name);
    } catch {
      // It was the directory itself, which is closed by now.
    }
  }
  return sockets;
}

/** How many files and sockets a process has open. */
function countDescriptors(pid: number): number {
  return readdirSync(`/proc/${pid}/fd`).length;
}

// ---- The model for every order of events --------------------------------------------------------

/*
 * The outcome of a call depends on what else happens, and in which order: the peer sends, ends its
 * stream, or resets; the kernel has room again; a minute passes; or this process calls another
 * method. Here a `Connection` and a model go through every short sequence of such moves. They must
 * then agree on the outcome of each call, on what the peer sees, on what stays in the kernel, and
 * on whether a timer or the descriptor is still held.
 *
 * - `BlockingSocket` is the model. It says what a connection promises, as plain changes of state:
 *   there are no events in it, and no `await`.
 * - `SimulatedConnection` wraps a `Connection` whose socket, timers and event loop are simulated.
 *   They behave as Bun's own were observed to behave. A sequence takes microseconds, and a test
 *   decides how much room the kernel has.
 * - `RealConnection` wraps a `Connection` over a real socket. It shows that Bun and the kernel
 *   still behave as simulated.
 * - `Network` is the kernel and the peer, as both the model and the simulated connection see them.
 *
 * Here is one sequence, step by step, as the model sees it. At first the kernel has room for one
 * message, which is three bytes.
 *
 *     sendAll           The kernel takes "ABC": `sent` is "ABC", `room` is 0, the call is done.
 *     roomForTwoBytes   `room` is 2. Bun reports it, but no call is waiting for it.
 *     sendAll           The kernel takes "DE": `sent` is "ABCDE". The call waits to send "F".
 *     aMinutePasses     The call rejects with `TIMED_OUT`. "ABCDE" does not consist of whole
 *                       messages: the stream has a gap.
 *     close             The stream must not look whole. The peer sees a reset, not an end.
 *
 * When a test fails, it shows the shortest sequence that reveals the mistake. If the program forgot
 * that part of a message was sent, it would show this sequence, which is shorter than the one
 * above:
 *
 *     after roomForOneByte; then sendAll; then shutdown
 *      got the peer sees "A" and then an end
 *     want the peer sees "A" and then nothing
 *
 * To add a method to `Connection`, write it in the program first. Then:
 *
 * 1. If it receives, add it to `RECEIVING_METHODS` at the top of this file. Otherwise, add its name
 *    to `SENDING_MOVES`. It is then one of the moves, and `bun check` names the classes below that
 *    lack it.
 * 2. Add it to `BlockingSocket`, as plain changes of state. If it waits for bytes, have it call
 *    `receive` with a function that returns how many of the unread bytes are the result, or 0 if it
 *    has to wait.
 * 3. Add it to `Caller`, which calls the real method. `RealConnection` inherits it.
 * 4. Add it to `SimulatedConnection`, which passes the call on to its `Caller`.
 * 5. Run the suite. "prints its addresses and its methods" fails until it lists the method.
 *    Everything that holds for every method in `RECEIVING_METHODS` is tested already: the
 *    arguments, the stack of an error, that the method yields, that it excludes other readers, and
 *    that `close` makes it reject. (If "refuses other readers" fails, the method may settle too
 *    late: it must return the promise of `#receive` itself, without `then` or `async`. Or it leaves
 *    the bytes unread: see below.)
 * 6. If it has a section of its own, name the section in the list at the top of this file.
 * 7. Document it: in its own comment, in the table of `Connection`, and in the README's reference.
 *
 * Three kinds of methods need more than that:
 *
 * - A method that leaves the bytes unread. `receive` needs a parameter, which it stores in `Reader`
 *   as a flag, and `settleReader` passes the flag to `takeUnread` in both places. In "refuses other
 *   readers", the method has left "line\n" unread. Have the callback take `kind`, too, and for this
 *   kind alone, receive the line in two places with an `await sock.recv(5)`: just before `second`
 *   if `isFree`, and at the start of the `else` branch.
 * - A method whose result is not the bytes. `Reader` needs a function that turns the bytes into the
 *   outcome, for the same two places.
 * - A method whose results could share memory. The model compares them as text, so the method needs
 *   a test of its own.
 *
 * One more move makes the tests of the model take about 50% longer.
 *
 * If several tests of the model fail, read the first of the simulated ones: its sequence is the
 * shortest.
 */
describe("every order of events", () => {
  afterEach(() => {
    Object.assign(globalThis, REAL_TIMERS);
  });

  // The shorter sequences come first, so that the first failure is the shortest. At these lengths,
  // no test takes more than about two seconds. With sequences longer by one, the slowest would take
  // forty seconds.
  test.each([1, 2, 3, 4])(
    "agrees with the model for every sequence of length %p, however it is split into turns",
    (length) => {
      for (const moves of sequences(length, MOVES)) {
        for (const turns of divisions(moves)) compare(turns);
      }
    },
  );

  test("agrees with the model for every sequence of 5 moves on a receiving connection", () => {
    const some = [...RECEIVING_MOVES, "close", "aMinutePasses"] as const;
    for (const moves of sequences(5, some)) compare(oneATurn(moves));
  });

  test("agrees with the model for every sequence of 5 moves on a sending connection", () => {
    const some = [...SENDING_MOVES, ...ROOM_MOVES, "close", "aMinutePasses"] as const;
    for (const moves of sequences(5, some)) compare(oneATurn(moves));
  });

  test.each([1, 2, 3])(
    "agrees with the model on real sockets for every sequence of length %p, however it is split",
    async (length) => {
      using listener = new PeerListener();
      for (const moves of sequences(length, REAL_MOVES)) {
        for (const turns of divisions(moves)) await compareReal(turns, listener);
      }
    },
  );

  test("agrees with the model on real sockets for every sequence of 4 quick moves", async () => {
    using listener = new PeerListener();
    for (const moves of sequences(4, QUICK_REAL_MOVES)) {
      await compareReal(oneATurn(moves), listener);
    }
  });
});

const RECEIVING_CALLS = Object.keys(RECEIVING_METHODS) as (keyof typeof RECEIVING_METHODS)[];
const RECEIVING_MOVES = ["pieceArrives", "peerEnds", "peerResets", ...RECEIVING_CALLS] as const;
const SENDING_MOVES = ["sendAll", "shutdown", "abort"] as const;
/** The peer reads a little, so that the kernel has room to send. */
const ROOM_MOVES = ["roomForOneByte", "roomForTwoBytes"] as const;
const MOVES = [
  ...RECEIVING_MOVES,
  ...SENDING_MOVES,
  ...ROOM_MOVES,
  "close",
  "aMinutePasses",
] as const;
type Move = (typeof MOVES)[number];

/** The moves on a real socket. How much room its kernel has is not known. */
const QUICK_REAL_MOVES = [...RECEIVING_MOVES, ...SENDING_MOVES, "close"] as const;
/** The last two take longer. `sendTooMuch` fills the kernel with part of a message. */
const REAL_MOVES = [...QUICK_REAL_MOVES, "sendTooMuch", "threeMinutesPass"] as const;
type RealMove = (typeof REAL_MOVES)[number];

const PEER_MOVES: string[] = ["pieceArrives", "peerEnds", "peerResets", ...ROOM_MOVES];

/**
 * What the peer sends, three bytes a move. The first delimiter is split across two pieces, and the
 * limit can cut the second.
 */
const INCOMING = "ab--cde--fghijklmn";
/** What this side sends, three bytes a message. */
const OUTGOING = "ABCDEFGHIJKLMNOPQR";
const PIECE_LENGTH = 3;
const DELIMITER = "--";
/** The most that a call receives. It is more than one piece, and less than two. */
const MAX_LENGTH = 5;
const TIMEOUT = 60; // seconds
const LINGER_TIME = 4; // seconds

/** What a call rejects with: the code, if there is one, and the message. */
const BUSY = "recv called while another recv is pending";
const BROKEN_PIPE = "EPIPE: broken pipe";
const CLOSED = "EBADF: the connection is closed";
const RESET = "ECONNRESET: connection reset by peer";
const SHUT_DOWN = "EPIPE: this side has called shutdown";
const TIMED_OUT = "ETIMEDOUT: timed out";
const AFTER_GAP = "EPIPE: an earlier sendAll failed";

const REAL_TIMERS = { setTimeout, clearTimeout, setImmediate };

/** The three bytes of `stream` that follow its first `index` pieces. */
function pieceOf(stream: string, index: number): string {
  return stream.slice(index * PIECE_LENGTH, (index + 1) * PIECE_LENGTH);
}

/** Every possible sequence of `length` moves. */
function* sequences<Some extends string>(
  length: number,
  moves: readonly Some[],
): Generator<Some[]> {
  if (length === 0) {
    yield [];
    return;
  }
  for (const before of sequences(length - 1, moves)) {
    for (const move of moves) {
      if (isPossible(move, before)) yield [...before, move];
    }
  }
}

/**
 * A peer that has reset does nothing more. One that has ended its stream does not send, or end it
 * again.
 */
function isPossible(move: string, before: string[]): boolean {
  if (before.includes("peerResets")) return !PEER_MOVES.includes(move);
  if (before.includes("peerEnds")) return move !== "pieceArrives" && move !== "peerEnds";
  return true;
}

/** A turn of the event loop after each move. */
function oneATurn<Some>(moves: Some[]): Some[][] {
  return moves.map((move) => [move]);
}

/** Every way to divide the moves into turns: [[a], [b]] and [[a, b]] for [a, b]. */
function* divisions<Some>(moves: Some[]): Generator<Some[][]> {
  if (moves.length === 0) {
    yield [];
    return;
  }
  for (let count = 1; count <= moves.length; count += 1) {
    const firstTurn = moves.slice(0, count);
    for (const others of divisions(moves.slice(count))) yield [firstTurn, ...others];
  }
}

/** Throws if a simulated connection and the model disagree after the moves. */
function compare(turns: Move[][]): void {
  const first = play(turns);
  if (first.got === first.want) return;
  // Every 64th call yields, which can change the outcome. When the moves are made again, the 64th
  // is another call, so only a difference in both runs counts. ("a busy connection" tests the
  // yielding itself.)
  const second = play(turns);
  expectSame(turns, second.got, second.want);
}

/**
 * Makes the moves, and returns what a simulated connection and the model show in the end. (Earlier
 * turns need no comparison: each was the end of a shorter sequence.)
 */
function play(turns: Move[][]): { got: string; want: string } {
  const simulated = new SimulatedConnection();
  const model = new BlockingSocket();
  for (const moves of turns) {
    for (const move of moves) {
      simulated[move]();
      model[move]();
    }
    simulated.turn();
    model.turn();
  }
  return { got: shown(simulated), want: shown(model) };
}

/**
 * Makes the moves with a real connection and the model, then closes both. Throws if they disagree on
 * the calls after a turn, or on what the peer sees in the end.
 */
async function compareReal(turns: RealMove[][], listener: PeerListener): Promise<void> {
  const real = await listener.connect();
  const model = new BlockingSocket();
  model.room = Infinity;
  const made: RealMove[][] = [];
  for (const moves of [...turns, ["close" as const]]) {
    for (const move of moves) {
      const passing = real[move]();
      if (passing !== undefined) await passing; // Without an `await`, moves share a turn.
      model[move]();
    }
    await real.turn();
    model.turn();
    made.push(moves);
    await real.turnUntil(() => shownCalls(real) === shownCalls(model));
    expectSame(made, shownCalls(real), shownCalls(model));
  }
  const canPeerTell = !model.hasReset && !real.hasPeerHitReset;
  if (canPeerTell) {
    real.peerReads();
    await real.turnUntil(() => shownToPeer(real) === shownToPeer(model));
    expectSame(made, shownToPeer(real), shownToPeer(model));
  }
  real.end();
}

/** Everything that is compared between a simulated connection and the model. */
function shown(socket: SimulatedConnection | BlockingSocket): string {
  const kernel = `unread in the kernel "${socket.inKernel}"`;
  const descriptor = socket.isOpen ? kernel : "the socket is gone";
  return `${shownCalls(socket)}\n${shownToPeer(socket)}\n${descriptor}`;
}

function shownCalls(socket: { calls: Call[]; timers(): number[] }): string {
  const calls = socket.calls.map(({ name, outcome }, i) => `call ${i + 1}, ${name}: ${outcome}\n`);
  return `${calls.join("")}timers: [${socket.timers().join(", ")}]`;
}

function shownToPeer(socket: { sent: string; ending: Ending }): string {
  return `the peer sees "${socket.sent}" and then ${socket.ending}`;
}

/** Throws if `got` differs from `want`, and says which lines differ, after which moves. */
function expectSame(turns: string[][], got: string, want: string): void {
  if (got === want) return;
  const made = turns.map((moves) => moves.join(" and ")).join("; then ");
  throw new Error(`after ${made}\n got ${linesNotIn(want, got)}\nwant ${linesNotIn(got, want)}`);
}

/** The lines of `text` that `other` does not have. */
function linesNotIn(other: string, text: string): string {
  const others = other.split("\n");
  const lines = text.split("\n").filter((line) => !others.includes(line));
  return lines.join("; ");
}

/** A call that receives or sends. */
type Call = {
  name: string;
  /** What it has resolved to, or rejected with. */
  outcome: string;
};
const WAITS = "waits"; // the outcome until then

/** What the peer sees after the last byte. An end says that it has seen all there is. */
type Ending = "nothing" | "an end" | "a reset";

/**
 * The kernel and the peer, and when Bun looks at them. The model and the simulated connection both
 * inherit this, so comparing them does not reveal a mistake here. The runs on real sockets reveal a
 * mistake in `isReading`. A mistake in `isRoomReported` is revealed only by the tests of `sendAll`,
 * because in the runs on real sockets a full kernel stays full.
 */
class Network {
  /** What has arrived in the kernel and has not been read by Bun. */
  inKernel = "";
  /** How many pieces have arrived. */
  pieces = 0;
  /** Whether the peer has ended its stream. */
  hasFin = false;
  /** Whether the peer has reset the connection. */
  hasReset = false;
  /** Whether a write has hit that reset. The kernel reports it only once. */
  hasWriteHitReset = false;
  /** How many more bytes the kernel takes to send. */
  room = PIECE_LENGTH;
  /** What the kernel has taken to send. */
  sent = "";
  /** Whether this side has ended its stream. */
  hasSentFin = false;
  /** Whether this side has reset the connection. */
  hasSentReset = false;
  /** Whether this process holds the descriptor. */
  isOpen = true;
  /** Whether Bun was told not to read. */
  isPaused = false;
  /** The calls, in order. */
  calls: Call[] = [];

  pieceArrives(): void {
    this.inKernel += pieceOf(INCOMING, this.pieces);
    this.pieces += 1;
  }

  peerEnds(): void {
    this.hasFin = true;
  }

  peerResets(): void {
    this.hasReset = true;
  }

  /** The room is now one byte, whatever it was. Bun does not report so little. */
  roomForOneByte(): void {
    this.room = 1;
  }

  /**
   * Bun reports room only when there is a lot. Here, two bytes are a lot, but less than a message.
   */
  roomForTwoBytes(): void {
    this.room = 2;
  }

  /** Takes as many of the bytes as there is room for, and returns how many that is. */
  takeToSend(bytes: string): number {
    const taken = bytes.slice(0, this.room);
    this.sent += taken;
    this.room -= taken.length;
    return taken.length;
  }

  sendFin(): void {
    if (this.isOpen) this.hasSentFin = true;
  }

  sendReset(): void {
    if (this.isOpen) this.hasSentReset = true;
  }

  get ending(): Ending {
    if (this.hasReset) return "nothing"; // A peer that has reset sees neither an end nor a reset.
    if (this.hasSentFin) return "an end"; // A reset that follows an end does not undo it.
    if (this.hasSentReset) return "a reset";
    return "nothing";
  }

  /** Whether Bun reports room to send. */
  isRoomReported(): boolean {
    return this.isOpen && this.room > 1 && !this.hasReset;
  }

  /** Whether Bun reads. It reads all that came before a reset, even if it was told not to. */
  isReading(): boolean {
    const mustReportReset = this.hasReset && !this.hasWriteHitReset;
    return this.isOpen && (!this.isPaused || mustReportReset);
  }
}

/** A call that waits to receive. */
type Reader = {
  call: Call;
  /** How many of the unread bytes are the result. With 0, the call waits for more. */
  readyLength(unread: string): number;
};

/** A `sendAll` that waits to send. */
type Writer = {
  call: Call;
  /** What the kernel has not taken yet. */
  unsent: string;
};

/** The model: what a connection promises, as plain changes of state. */
class BlockingSocket extends Network {
  /** What Bun has read and no call has returned yet. */
  unread = "";
  /** The call that waits to receive. There can only be one. */
  reader: Reader | undefined;
  /** Whether a call that receives is pending. It stays pending until its caller resumes. */
  isReaderBusy = false;
  /** The waiting calls of `sendAll`, in order. Only the first of them sends. */
  writers: Writer[] = [];
  /** How many messages `sendAll` was given. */
  messages = 0;
  /** Whether a `sendAll` has failed while others waited behind it: its message is missing. */
  lacksMessage = false;
  /** Whether `shutdown` was called: this side sends no more. */
  hasShutDown = false;
  /** Whether `close` or `abort` was called. */
  hasClosed = false;
  /** Whether this process has heard of the end of the peer's stream. */
  peerHasEnded = false;
  /** Whether it has heard that the connection is gone. */
  isDisconnected = false;
  /** Why the connection broke. Empty if it has not. The first reason stays. */
  failure = "";

  /** Resolves to what has arrived, as soon as there is any, or to the end of the stream. */
  recv(): void {
    this.receive("recv", (unread) => Math.min(unread.length, MAX_LENGTH));
  }

  /** Resolves to what has arrived, up to the end of a delimiter, or to all that it may take. */
  recvUntil(): void {
    this.receive("recvUntil", (unread) => {
      const allowed = unread.slice(0, MAX_LENGTH);
      const index = allowed.indexOf(DELIMITER);
      if (index >= 0) return index + DELIMITER.length;
      return allowed.length === MAX_LENGTH ? MAX_LENGTH : 0;
    });
  }

  /** Takes bytes that have arrived, or waits for them. A second call meanwhile is refused. */
  private receive(name: string, readyLength: Reader["readyLength"]): void {
    const call = this.begin(name);
    if (this.isReaderBusy) {
      call.outcome = BUSY;
      return;
    }
    this.isReaderBusy = true;
    this.reader = { call, readyLength };
    this.settleReader();
    const isWaiting = this.reader !== undefined;
    if (isWaiting) this.isPaused = false;
  }

  /** Resolves when the kernel has taken the whole message. Calls are sent one after the other. */
  sendAll(): void {
    this.send(pieceOf(OUTGOING, this.messages));
    this.messages += 1;
  }

  /**
   * On a real socket, this sends so much that the kernel cannot take it all. In the model, "!!!"
   * stands for it, of which the kernel takes one "!".
   */
  sendTooMuch(): void {
    if (this.room === Infinity) this.room = 1;
    this.send("!!!");
  }

  private send(message: string): void {
    this.writers.push({ call: this.begin("sendAll"), unsent: message });
    const isFirst = this.writers.length === 1;
    if (isFirst) this.write();
  }

  /** Ends what this side sends, unless the stream has a gap. Receiving goes on. */
  shutdown(): void {
    this.hasShutDown = true;
    if (!this.hasGap) this.sendFin();
  }

  /**
   * Ends what this side sends, and lingers until the peer ends its stream. Resets if there is a
   * gap.
   */
  close(): void {
    if (this.hasClosed) return;
    if (this.hasGap) {
      this.abort();
      return;
    }
    this.shutdown();
    this.hasClosed = true;
    this.unread = "";
    this.isPaused = false; // What still arrives is read, and discarded.
    const canStillArrive = !this.peerHasEnded && this.failure === "";
    if (!canStillArrive) this.isOpen = false;
  }

  /** Resets the connection, even while it lingers. */
  abort(): void {
    this.hasClosed = true;
    this.unread = "";
    this.sendReset();
    this.isOpen = false;
  }

  /** A stream that stops in the middle of a message, or lacks one, must not look whole. */
  private get hasGap(): boolean {
    return this.sent.length % PIECE_LENGTH !== 0 || this.lacksMessage;
  }

  /** The event loop turns: calls that wait learn of what has happened, in this order. */
  turn(): void {
    // What this process has done itself comes first.
    this.settleReader();
    this.settleWriters();
    // Bun reports room, then bytes, then the end, then a reset.
    if (this.isRoomReported()) this.write();
    if (this.isReading()) this.readKernel();
    const isStillReading = this.isReading(); // It has paused if nobody waited for the bytes.
    if (isStillReading && this.hasFin) this.hearEnd();
    if (isStillReading && this.hasReset) this.hearReset();
    this.settleReader();
    this.settleWriters();
    this.isReaderBusy = this.reader !== undefined;
  }

  /**
   * Calls that have waited for a minute time out, unless a byte has been received or sent in that
   * minute.
   */
  aMinutePasses(): void {
    const readerBefore = this.reader;
    const unreadBefore = this.unread;
    const sentBefore = this.sent;
    const isWriting = this.writers.length > 0; // The time of a call begins with its turn.
    this.turn(); // What has arrived counts, even if the timers fire first.
    const isReaderLate = this.reader === readerBefore && this.unread === unreadBefore;
    if (isReaderLate) this.timeOutReader();
    // Bun does not report small amounts of room.
    if (isWriting && this.sent === sentBefore) this.write();
    if (isWriting && this.sent === sentBefore) this.timeOutWriter();
    if (this.hasClosed) this.isOpen = false; // It lingers no longer.
    this.isReaderBusy = this.reader !== undefined;
  }

  /** Three, because a real kernel may still take a little more in each of the first two. */
  threeMinutesPass(): void {
    for (let i = 0; i < 3; i += 1) this.aMinutePasses();
  }

  /** The timers that run, in seconds: one for each thing that waits. */
  timers(): number[] {
    const timers: number[] = [];
    if (this.reader !== undefined) timers.push(TIMEOUT);
    if (this.writers.length > 0) timers.push(TIMEOUT);
    const isLingering = this.hasClosed && this.isOpen;
    if (isLingering) timers.push(LINGER_TIME);
    return timers;
  }

  private readKernel(): void {
    const bytes = this.inKernel;
    this.inKernel = "";
    if (this.hasClosed || bytes === "") return;
    this.unread += bytes;
    const isAwaited = this.reader !== undefined;
    if (!isAwaited) this.isPaused = true; // What comes next stays in the kernel.
  }

  private hearEnd(): void {
    if (this.failure === "") this.peerHasEnded = true; // After a failure, it does not count.
    if (this.hasSentFin) this.disconnect(); // Both sides have ended.
  }

  private hearReset(): void {
    if (this.isDisconnected) return; // Both sides had ended before.
    this.fail(this.hasFin ? BROKEN_PIPE : RESET);
    this.disconnect();
  }

  private fail(reason: string): void {
    if (this.failure === "") this.failure = reason;
  }

  private disconnect(): void {
    this.isOpen = false;
    this.isDisconnected = true;
  }

  /**
   * Gives the reader its bytes. If no more can come, it gives what is left at the end of
   * the stream, or the reason why there is no end.
   */
  private settleReader(): void {
    if (this.reader === undefined) return;
    const { call, readyLength } = this.reader;
    const length = readyLength(this.unread);
    if (length > 0) call.outcome = this.takeUnread(length);
    else if (this.hasClosed) call.outcome = CLOSED;
    else if (this.peerHasEnded) call.outcome = this.takeUnread(MAX_LENGTH) || "end";
    else if (this.isDisconnected) call.outcome = this.failure;
    const isSettled = call.outcome !== WAITS;
    if (isSettled) this.reader = undefined;
  }

  private timeOutReader(): void {
    if (this.reader === undefined) return;
    this.reader.call.outcome = TIMED_OUT; // What has arrived for it stays unread.
    this.reader = undefined;
  }

  private takeUnread(length: number): string {
    const taken = this.unread.slice(0, length);
    this.unread = this.unread.slice(length);
    return taken;
  }

  /** Sends as much as there is room for, in the order of the calls, if they can still be sent. */
  private write(): void {
    this.settleWriters();
    const meetsReset = this.hasReset && this.writers.length > 0;
    if (meetsReset) {
      this.hasWriteHitReset = true;
      this.fail(this.peerHasEnded ? BROKEN_PIPE : RESET);
      this.settleWriters();
    }
    for (;;) {
      const writer = this.writers[0];
      if (writer === undefined) return;
      const taken = this.takeToSend(writer.unsent);
      writer.unsent = writer.unsent.slice(taken);
      if (writer.unsent !== "") return;
      writer.call.outcome = "sent";
      this.writers.shift();
    }
  }

  /** Fails the waiting calls of `sendAll` if they can no longer be sent. */
  private settleWriters(): void {
    const first = this.writers[0];
    if (first === undefined) return;
    const hasBegun = first.unsent.length < PIECE_LENGTH;
    if (this.hasClosed) this.failWriters(CLOSED);
    else if (this.failure !== "") this.failWriters(this.failure);
    else if (this.hasShutDown) this.failWriters(SHUT_DOWN);
    else if (this.hasGap && !hasBegun) this.failWriters(AFTER_GAP);
  }

  private failWriters(reason: string): void {
    for (const { call } of this.writers) call.outcome = reason;
    this.writers = [];
  }

  /** The first call fails. Those behind it must not be sent without it. */
  private timeOutWriter(): void {
    const first = this.writers.shift();
    if (first === undefined) return;
    first.call.outcome = TIMED_OUT;
    this.lacksMessage = this.writers.length > 0;
    this.settleWriters();
  }

  private begin(name: string): Call {
    const call = { name, outcome: WAITS };
    this.calls.push(call);
    return call;
  }
}

/** Calls the methods of a connection, and records the outcome of each call in the model's words. */
class Caller {
  readonly calls: Call[];
  private readonly connection: Connection;
  private messages = 0;

  constructor(connection: Connection, calls: Call[]) {
    this.connection = connection;
    this.calls = calls;
  }

  recv(): void {
    this.noteBytes("recv", this.connection.recv(MAX_LENGTH));
  }

  recvUntil(): void {
    this.noteBytes("recvUntil", this.connection.recvUntil(DELIMITER, MAX_LENGTH));
  }

  sendAll(): void {
    this.send(pieceOf(OUTGOING, this.messages));
    this.messages += 1;
  }

  shutdown(): void {
    this.connection.shutdown();
  }

  close(): void {
    this.connection.close();
  }

  abort(): void {
    this.connection.abort();
  }

  protected send(message: string | Buffer): void {
    const showSent = () => "sent";
    this.note("sendAll", this.connection.sendAll(message).then(showSent));
  }

  private noteBytes(name: string, received: Promise<Buffer>): void {
    const showBytes = (bytes: Buffer) => (bytes.length === 0 ? "end" : String(bytes));
    this.note(name, received.then(showBytes));
  }

  private note(name: string, result: Promise<string>): void {
    const call = { name, outcome: WAITS };
    this.calls.push(call);
    const onResolved = (outcome: string) => {
      call.outcome = outcome;
    };
    const onRejected = (error: NodeJS.ErrnoException) => {
      const hasCode = error.code !== undefined;
      call.outcome = hasCode ? `${error.code}: ${error.message}` : error.message;
    };
    result.then(onResolved, onRejected);
  }
}

/** Replaces the real timers with timers that fire only when a test advances the clock. */
class SimulatedClock {
  private readonly running = new Set<{ delay: number; ring: () => void }>();

  constructor() {
    Object.assign(globalThis, {
      setTimeout: (ring: () => void, delay: number) => this.startTimer(ring, delay),
      clearTimeout: (timer: never) => this.running.delete(timer),
    });
  }

  /** The timers that run, in seconds. */
  timers(): number[] {
    return [...this.running].map(({ delay }) => delay / 1000);
  }

  /** Fires the timers that run now and are due within `time` milliseconds. */
  pass(time: number): void {
    const due = [...this.running].filter(({ delay }) => delay <= time);
    for (const timer of due) {
      this.running.delete(timer);
      timer.ring();
      drainMicrotasks();
    }
  }

  private startTimer(ring: () => void, delay: number): unknown {
    const timer = { ring, delay };
    this.running.add(timer);
    return timer;
  }
}

/** A `Connection` whose socket, timers and event loop behave as Bun's were observed to on Linux. */
class SimulatedConnection extends Network {
  private isWriteShort = false; // Bun owes a `drain`.
  private hasReportedEnd = false; // Bun calls `end` once.
  private readonly clock = new SimulatedClock();
  private immediates: (() => void)[] = []; // what `setImmediate` was given in this turn
  private readonly socket = this.simulatedSocket();
  private readonly caller: Caller;

  /** Also takes the place of `setImmediate`. `REAL_TIMERS` has the real one. */
  constructor() {
    super();
    Object.assign(globalThis, {
      setImmediate: (callback: () => void) => this.immediates.push(callback),
    });
    const connection = new Connection(this.socket, TIMEOUT);
    this.socket.data = connection; // where the handlers find it
    this.caller = new Caller(connection, this.calls);
  }

  recv(): void {
    this.caller.recv();
  }

  recvUntil(): void {
    this.caller.recvUntil();
  }

  sendAll(): void {
    this.caller.sendAll();
  }

  shutdown(): void {
    this.caller.shutdown();
  }

  close(): void {
    this.caller.close();
  }

  abort(): void {
    this.caller.abort();
  }

  timers(): number[] {
    return this.clock.timers();
  }

  /** Bun looks at its sockets, then at its timers, then at what waits for the turn to be over. */
  turn(): void {
    drainMicrotasks();
    this.poll();
    this.clock.pass(0);
    const immediates = this.immediates;
    this.immediates = [];
    for (const callback of immediates) callback();
    drainMicrotasks();
  }

  /** A process that was busy for a minute hears of its timers before it hears of its sockets. */
  aMinutePasses(): void {
    drainMicrotasks();
    this.clock.pass(60_000);
    this.turn();
  }

  /** The socket as the connection knows it. */
  private simulatedSocket(): Socket<Connection> {
    const socket = {
      setKeepAlive: () => {},
      pause: () => {
        this.isPaused = true;
      },
      resume: () => {
        this.isPaused = false;
      },
      write: (bytes: Uint8Array, start: number, count: number) => {
        return this.write(Buffer.from(bytes).toString("latin1", start, start + count));
      },
      shutdown: () => this.sendFin(),
      end: () => {
        this.sendFin();
        this.closeSocket();
      },
      terminate: () => {
        this.sendReset();
        this.closeSocket();
      },
    };
    return socket as unknown as Socket<Connection>;
  }

  private write(bytes: string): number {
    if (this.hasReset) this.hasWriteHitReset = true;
    if (this.hasReset || this.hasSentFin) return -1;
    const taken = this.takeToSend(bytes);
    this.isWriteShort = taken < bytes.length;
    return taken;
  }

  private poll(): void {
    if (this.isWriteShort && this.isRoomReported()) {
      this.isWriteShort = false;
      this.call("drain");
    }
    if (this.isReading() && this.inKernel !== "") {
      const bytes = Buffer.from(this.inKernel);
      this.inKernel = "";
      this.call("data", bytes);
    }
    // The handler of `data` may have paused the socket. Then Bun looks no further.
    if (!this.isReading()) return;
    // Bun also calls `end` for a failed write, but not after this side has ended its stream.
    const isEndReported = (this.hasFin || this.hasWriteHitReset) && !this.hasSentFin;
    if (isEndReported && !this.hasReportedEnd) {
      this.hasReportedEnd = true;
      this.call("end");
    }
    // A reset that comes after the peer's end is an error, too, unless both sides have ended their
    // streams. The kernel's code for it is EPIPE.
    const haveBothEnded = this.hasFin && this.hasSentFin;
    const hasError = this.hasReset && !this.hasWriteHitReset && !haveBothEnded;
    if (hasError) this.closeSocket(this.hasFin ? "EPIPE" : "ECONNRESET");
    else if (this.hasReset || haveBothEnded) this.closeSocket();
    drainMicrotasks();
  }

  private closeSocket(code?: string): void {
    if (!this.isOpen) return;
    this.isOpen = false;
    const error = code === undefined ? undefined : Object.assign(new Error(code), { code });
    void Connection.handlers.close?.(this.socket, error);
  }

  /** Calls a handler. Whoever it wakes goes on in a microtask, before Bun calls another handler. */
  private call(name: "data" | "end" | "drain", bytes?: Buffer): void {
    const handler = Connection.handlers[name] as (socket: unknown, bytes?: Buffer) => void;
    handler(this.socket, bytes);
    drainMicrotasks();
  }
}

/** What the peer of a real connection has seen so far. */
type Seen = { text: string; ending: Ending };

/**
 * A `Connection` over a real socket, and its peer, one of Bun's own sockets. Only the clock is
 * simulated, so that a minute takes no time.
 */
class RealConnection extends Caller {
  /** Whether the peer's write has hit a reset. Bun then tells the peer of an end instead. */
  hasPeerHitReset = false;
  private pieces = 0;
  private readonly peer: Socket<Seen>;
  private readonly clock: SimulatedClock;

  constructor(connection: Connection, peer: Socket<Seen>, clock: SimulatedClock) {
    super(connection, []);
    this.peer = peer;
    this.clock = clock;
  }

  end(): void {
    this.peer.terminate();
  }

  /** What the kernel took of `TOO_MUCH`, any number of zeros, is shown as the model's one "!". */
  get sent(): string {
    const { text } = this.peer.data;
    const firstZero = text.indexOf("\0");
    return firstZero < 0 ? text : `${text.slice(0, firstZero)}!`;
  }

  get ending(): Ending {
    return this.peer.data.ending;
  }

  timers(): number[] {
    return this.clock.timers();
  }

  pieceArrives(): void {
    const written = this.peer.write(pieceOf(INCOMING, this.pieces));
    this.pieces += 1;
    if (written < 0) this.hasPeerHitReset = true;
  }

  peerEnds(): void {
    this.peer.shutdown();
  }

  peerResets(): void {
    this.peer.terminate();
  }

  /** Sends more than the kernel takes, to a peer that does not read. */
  sendTooMuch(): void {
    this.peer.pause();
    this.send(TOO_MUCH);
  }

  peerReads(): void {
    this.peer.resume();
  }

  async threeMinutesPass(): Promise<void> {
    drainMicrotasks();
    for (let i = 0; i < 3; i += 1) {
      this.clock.pass(60_000);
      await this.turn();
      this.clock.pass(0);
      await this.turn();
    }
  }

  async turn(): Promise<void> {
    await pollSockets();
  }

  /** Lets the event loop turn until `isSeen`, but at most 100 times: a busy kernel may be late. */
  async turnUntil(isSeen: () => boolean): Promise<void> {
    for (let i = 0; i < 100; i += 1) {
      if (isSeen()) return;
      await this.turn();
    }
  }
}

/** Listens for the peers of real connections. Declare it with `using`. */
class PeerListener {
  private accept = (_peer: Socket<Seen>) => {};
  private readonly listener = Bun.listen<Seen>({
    hostname: "127.0.0.1",
    port: 0,
    allowHalfOpen: true,
    socket: {
      open: (peer) => {
        peer.data = { text: "", ending: "nothing" };
        this.accept(peer);
      },
      data(peer, bytes) {
        peer.data.text += String(bytes);
      },
      end(peer) {
        peer.data.ending = "an end";
      },
      close(peer, error) {
        // When both sides have ended their streams, Bun does not call `end` first.
        if (peer.data.ending === "nothing") peer.data.ending = error ? "a reset" : "an end";
      },
    },
  });

  async connect(): Promise<RealConnection> {
    const clock = new SimulatedClock();
    const { promise: accepted, resolve } = Promise.withResolvers<Socket<Seen>>();
    this.accept = resolve;
    const sock = await connect("127.0.0.1", this.listener.port, TIMEOUT);
    return new RealConnection(sock, await accepted, clock);
  }

  [Symbol.dispose](): void {
    this.listener.stop();
  }
}
