import { afterAll, afterEach, beforeEach, describe, expect, spyOn, test } from "bun:test";
import { drainMicrotasks } from "bun:jsc";
import { EventEmitter, once } from "node:events";
import { existsSync, readdirSync } from "node:fs";
import type { Socket } from "bun";
import {
  client,
  connect,
  Connection,
  EOFError,
  listen,
  main,
  PORT,
  recvAll,
  repr,
  server,
} from "./tcp_local.ts";

const LOCALHOST = "127.0.0.1";
const HI = Buffer.from("Hi there, server");
const BYE = Buffer.from("Farewell, client");
const MiB = 2 ** 20;

// ---- What the tests hear, and what they play ----------------------------------------------------

const events = new EventEmitter().setMaxListeners(0);

/** `data`, `end` and `close`: what Bun has told a connection of the module. */
const { data, end, close } = Connection.handlers;
Object.assign(Connection.handlers, {
  data: (...args) => void events.emit("data", data?.(...args)),
  end: (...args) => void events.emit("end", end?.(...args)),
  close: (...args) => void events.emit("close", close?.(...args)),
} satisfies typeof Connection.handlers);

/** `line`: this process has printed one. */
const out: string[] = [];
const err: string[] = [];
const spies = (
  [
    ["log", out],
    ["error", err],
  ] as const
).map(([method, lines]) =>
  spyOn(console, method).mockImplementation((text: string) => {
    lines.push(...text.split("\n"));
    events.emit("line");
  }),
);
beforeEach(() => void (out.length = err.length = 0));
afterAll(() => spies.forEach((spy) => spy.mockRestore()));

/** Resolves once there are `length` lines, and takes them away. */
async function take(lines: string[], length: number): Promise<string[]> {
  while (lines.length < length) await once(events, "line");
  return lines.splice(0);
}

/** The other end of a connection. `peer` is the event that something came or went. */
class Peer {
  readonly ended = Promise.withResolvers<void>();
  readonly closed = Promise.withResolvers<"in order" | "by a reset">();
  received = Buffer.alloc(0);
  unsent = Buffer.alloc(0);

  static readonly handlers = {
    open: (socket: Socket<Peer>) => void (socket.data = new Peer(socket)),
    data: ({ data: peer }: Socket<Peer>, bytes: Buffer) => {
      peer.received = Buffer.concat([peer.received, bytes]);
      events.emit("peer");
    },
    drain: ({ data: peer }: Socket<Peer>) => peer.send(""),
    end: ({ data: peer }: Socket<Peer>) => peer.ended.resolve(),
    close: ({ data: peer }: Socket<Peer>, error?: Error) => {
      peer.ended.resolve();
      peer.closed.resolve(error ? "by a reset" : "in order");
      peer.send("");
    },
  };

  static async dial(port: number, hostname = LOCALHOST): Promise<Peer> {
    const socket = Peer.handlers;
    return (await Bun.connect<Peer>({ hostname, port, allowHalfOpen: true, socket })).data;
  }

  readonly name: string;

  constructor(readonly socket: Socket<Peer>) {
    this.name = `('${socket.localAddress}', ${socket.localPort})`;
  }

  send(bytes: Buffer | string): void {
    if (bytes.length > 0) this.unsent = Buffer.concat([this.unsent, Buffer.from(bytes)]);
    const sent = this.socket.write(this.unsent);
    this.unsent = this.unsent.subarray(sent < 0 ? this.unsent.length : sent);
    events.emit("peer");
  }

  /** Sends each piece once the connection of the module has the one before it. */
  async deliver(...pieces: (Buffer | string)[]): Promise<void> {
    for (const piece of pieces) {
      this.send(piece);
      await once(events, "data");
    }
  }

  /** What came, once the stream has ended. */
  async all(): Promise<string> {
    await this.ended.promise;
    return this.received.toString("latin1");
  }
}

const listeners: { port: number; stop(closeActiveConnections?: boolean): void }[] = [];
afterEach(() => listeners.splice(0).forEach((listener) => listener.stop(true)));

/** Listens for a connection to play the other end of. */
function peerListens(): { port: number; peer: Promise<Peer> } {
  const { promise: peer, resolve } = Promise.withResolvers<Peer>();
  const open = (socket: Socket<Peer>) => resolve((socket.data = new Peer(socket)));
  const socket = { ...Peer.handlers, open };
  const listener = Bun.listen({ hostname: LOCALHOST, port: 0, allowHalfOpen: true, socket });
  listeners.push(listener);
  return { port: listener.port, peer };
}

async function pair(timeout?: number): Promise<[Connection, Peer]> {
  const { port, peer } = peerListens();
  return [await connect(LOCALHOST, port, timeout), await peer];
}

/** The port of a listener of the module, which is stopped when the test is over. */
async function serving(starting = server(LOCALHOST, 0)): Promise<number> {
  const listener = await starting;
  listeners.push(listener);
  return listener.port;
}

async function exchange(port: number, message: Buffer | string = HI, host = LOCALHOST) {
  const peer = await Peer.dial(port, host);
  peer.send(message);
  const reply = await peer.all();
  peer.socket.end();
  return reply;
}

/** The lines of the original's server for one client. */
function transcript(host: string, port: number, peername: string, message: string): string[] {
  return [
    `We have accepted a connection from ${peername}`,
    `Socket connects ('${host}', ${port}) and ${peername}`,
    `The incoming sixteen-octet message says ${message}`,
    "Reply sent, socket closed",
    `Listening at ('${host}', ${port})`,
  ];
}

/** A process of Bun. `output` is the event that it printed, or ended. */
class Program implements AsyncDisposable {
  out = "";
  err = "";
  readonly process;
  readonly exited: Promise<number>;
  private closed = false; // after the first output
  private over = false;

  constructor(...args: string[]) {
    const cwd = import.meta.dir;
    this.process = Bun.spawn([process.execPath, ...args], { cwd, stdout: "pipe", stderr: "pipe" });
    const out = this.read(this.process.stdout, (text) => (this.out += text));
    const err = this.read(this.process.stderr, (text) => (this.err += text));
    this.exited = Promise.all([out, err]).then(() => this.process.exited);
    void this.exited.then(() => events.emit("output", (this.over = true)));
  }

  /** The server on a free port, once it listens. */
  static async serving(closed = false): Promise<Program & { port: number }> {
    const code = `import { server } from "./tcp_local.ts"; await server("${LOCALHOST}", 0);`;
    const program = new Program("-e", code);
    program.closed = closed;
    await program.until(({ out }) => out.endsWith("\n"));
    return Object.assign(program, { port: Number(/(\d+)\)\n/.exec(program.out)?.[1]) });
  }

  /** What the command line prints, and its exit status. */
  static async run(...args: string[]): Promise<{ status: number; out: string; err: string }> {
    const program = new Program("tcp_local.ts", ...args);
    return { status: await program.exited, out: program.out, err: program.err };
  }

  async until(condition: (program: this) => boolean): Promise<void> {
    while (!condition(this)) {
      if (this.over) throw new Error(`ended with ${this.out}${this.err}`);
      await once(events, "output");
    }
  }

  private async read(stream: ReadableStream<Uint8Array>, add: (text: string) => void) {
    for await (const bytes of stream) {
      add(Buffer.from(bytes).toString());
      events.emit("output");
      if (this.closed) return;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.process.kill("SIGKILL");
    await this.exited;
  }
}
// ---- recvAll and repr -------------------------------------------------------------------------

describe("recvAll", () => {
  /** A socket that gives `pieces`, then the end of the stream, and notes what it was asked for. */
  function scripted(pieces: Buffer[]) {
    const asked: number[] = [];
    const recv = async (maxLength: number) => {
      asked.push(maxLength);
      return pieces.shift() ?? Buffer.alloc(0);
    };
    return { asked, recv };
  }

  /** `bytes` in pieces, with a cut after every byte whose bit is set in `cuts`. */
  function cut(bytes: Buffer, cuts: number): Buffer[] {
    const ends = [...bytes.keys()].filter((i) => i > 0 && cuts & (1 << (i - 1)));
    return [0, ...ends].map((start, i) => bytes.subarray(start, ends[i])).filter((p) => p.length);
  }

  test("puts a message together from every one of the 32,768 ways to cut it", async () => {
    for (let cuts = 0; cuts < 2 ** 15; cuts++) {
      const pieces = cut(HI, cuts);
      let missing = 16;
      const asks = pieces.map((piece) => (missing -= piece.length) + piece.length);
      const sock = scripted(pieces);
      const message = await recvAll(sock, 16);
      const own = message.buffer.byteLength;
      if (message.equals(HI) && Bun.deepEquals(sock.asked, asks) && own === 16) continue;
      expect([cuts, `${message}`, sock.asked, own]).toEqual([cuts, `${HI}`, asks, 16]);
    }
  });

  test("says how far it got when the stream ends early", async () => {
    for (let length = 0; length < 16; length++) {
      const partial = HI.subarray(0, length);
      const error = await recvAll(scripted(cut(partial, 0b100100)), 16).catch((e) => e);
      expect(error).toBeInstanceOf(EOFError);
      expect(error).toMatchObject({ name: "EOFError", partial, expected: 16 });
      expect(error.message).toBe(`socket closed ${length} bytes into a 16-byte message`);
    }
  });

  test("reads nothing for a message of no bytes, and for a length that is none", async () => {
    const sock = scripted([HI]);
    expect(await recvAll(sock, 0)).toEqual(Buffer.alloc(0));
    for (const length of [-1, 1.5, NaN, Infinity]) {
      await expect(recvAll(sock, length)).rejects.toBeInstanceOf(RangeError);
    }
    expect(sock.asked).toEqual([]);
  });

  test("passes an error on as it is, also after the first piece", async () => {
    const error = new Error("no luck");
    for (const pieces of [[], [HI.subarray(0, 5)]]) {
      const recv = async () => pieces.shift() ?? Promise.reject(error);
      expect(await recvAll({ recv }, 16).catch((e) => e)).toBe(error);
    }
  });

  test("refuses what is given in the place of bytes", async () => {
    for (const given of [{}, undefined, "a string", new ArrayBuffer(4), new Uint16Array(4)]) {
      const recv = async () => given as Uint8Array;
      await expect(recvAll({ recv }, 16)).rejects.toBeInstanceOf(TypeError);
    }
  });

  test("copies 64 MiB that came in small pieces once", async () => {
    const piece = Buffer.alloc(4096, "x");
    const start = performance.now();
    const message = await recvAll({ recv: async () => piece }, 64 * MiB);
    expect(message.equals(Buffer.alloc(64 * MiB, "x"))).toBeTrue();
    // Concatenation would copy 512 GiB.
    expect(performance.now() - start).toBeLessThan(4000);
  });
});

describe("repr", () => {
  test("shows every byte as Python does", () => {
    const controls =
      String.raw`\x00\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0b\x0c\r\x0e\x0f` +
      String.raw`\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f`;
    const printable =
      String.raw` !"#$%&\'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_` +
      "`abcdefghijklmnopqrstuvwxyz{|}~";
    const high = Array.from({ length: 129 }, (_, i) => `\\x${(127 + i).toString(16)}`).join("");
    const bytes = Uint8Array.from({ length: 256 }, (_, byte) => byte);
    expect(repr(bytes)).toBe(`'${controls}${printable}${high}'`);
    expect(repr(bytes.subarray(97, 100))).toBe("'abc'");
  });

  test("quotes as Python does", () => {
    expect(repr("")).toBe(`''`);
    expect(repr("it's")).toBe(`"it's"`);
    expect(repr('say "hi"')).toBe(`'say "hi"'`);
    expect(repr(`it's "hi"`)).toBe(String.raw`'it\'s "hi"'`);
    expect(repr("it's a \\ \n")).toBe(String.raw`"it's a \\ \n"`);
  });
});

// ---- Every order of events, against a model of a blocking socket ------------------------------

/** What the kernel holds of a socket. */
class Kernel {
  arrived = ""; // and nobody has read it
  came = 0;
  fin = false;
  rst = false;
  room = Infinity; // for bytes to send: a writer is woken when there are 2
  sent = "";

  take(bytes: string): number {
    const taken = bytes.slice(0, this.room);
    this.sent += taken;
    this.room -= taken.length;
    return taken.length;
  }
}

const MOVES = {
  bytesCome: (s) => (s.arrived += "abcdefghijkl".slice(s.came, (s.came += 2))),
  peerEnds: (s) => (s.fin = true),
  peerResets: (s) => (s.rst = true),
  roomShrinks: (s) => (s.room = 1),
  roomGrows: (s) => (s.room = 2),
  recv1: (s) => s.recv(1),
  recv4: (s) => s.recv(4),
  sendAll: (s) => s.sendAll(),
  close: (s) => s.close(),
  minutePasses: (s) => s.minutePasses(),
} satisfies Record<string, (socket: Blocking | Played) => unknown>;
type Move = keyof typeof MOVES;

/** The model. What it is told between two turns happens in one tick. */
class Blocking extends Kernel {
  outcomes: string[] = []; // of the calls, in their order
  shut = false;
  open = true;
  waits = 0;
  private unread = "";
  private full = false; // with two pieces unread: the rest stays in the kernel
  private recvEnd: string | undefined;
  private sendEnd: string | undefined;
  private met = false; // by a write: the reset
  private reader: { call: number; maxLength: number } | undefined;
  private busy = false;
  private writers: { call: number; unsent: string }[] = [];

  get waiting(): number {
    return (this.reader ? 1 : 0) + (this.writers.length > 0 ? 1 : 0);
  }
  recv(maxLength: number): void {
    const call = this.outcomes.push("waits") - 1;
    if (this.shut || this.busy) this.outcomes[call] = this.shut ? "EBADF" : "refused";
    else {
      this.busy = true;
      this.reader = { call, maxLength };
      this.read();
      this.waits += this.reader ? 1 : 0;
    }
  }
  sendAll(): void {
    this.writers.push({ call: this.outcomes.push("waits") - 1, unsent: "WXYZ" });
    if (this.writers.length === 1) this.write();
  }
  close(): void {
    if (this.shut) return;
    this.open &&= this.unread !== "" || this.full;
    this.shut = true;
    this.full = false;
    this.unread = "";
    this.recvEnd = this.sendEnd = "EBADF";
    this.read();
    this.write();
  }
  /** The process hears what is new, and its calls return. */
  turn(): void {
    if (this.open && this.room > 1 && !this.rst) this.write();
    while (this.open && (!this.full || (this.rst && !this.met))) {
      if (this.arrived === "") {
        if (this.fin && !this.met) this.recvEnd ??= "end of stream";
        if (this.rst) this.sendEnd ??= this.fin ? "EPIPE" : "ECONNRESET";
        if (this.rst) this.recvEnd ??= this.sendEnd;
        this.open = !this.rst && !(this.fin && this.shut);
        this.read();
        if (this.sendEnd) this.write();
        break;
      }
      this.full = this.unread !== "";
      this.unread += this.shut ? "" : this.arrived;
      this.arrived = "";
      this.read();
    }
    this.busy = !!this.reader;
  }
  /** What waits all the time, and moves no byte, is over. */
  minutePasses(): void {
    const { reader, sent } = this;
    const writing = this.writers.length > 0;
    this.turn();
    if (this.reader === reader) this.read("ETIMEDOUT");
    if (writing && this.sent === sent && this.room > 0) this.write();
    if (writing && this.sent === sent) this.fail("ETIMEDOUT");
    this.open &&= !this.shut;
    this.turn();
  }

  private read(otherwise = this.recvEnd): void {
    if (!this.reader) return;
    const { call, maxLength } = this.reader;
    const outcome = this.unread.slice(0, maxLength) || otherwise;
    this.unread = this.unread.slice(maxLength);
    this.full &&= outcome !== undefined;
    if (outcome) [this.outcomes[call], this.reader] = [outcome, undefined];
  }
  private write(): void {
    for (let writer; (writer = this.writers[0]); this.writers.shift()) {
      if (this.rst && !this.sendEnd) [this.met, this.sendEnd] = [true, "ECONNRESET"];
      if (this.sendEnd) return this.fail(this.sendEnd);
      writer.unsent = writer.unsent.slice(this.take(writer.unsent));
      if (writer.unsent !== "") return void this.waits++;
      this.outcomes[writer.call] = "sent";
    }
  }
  private fail(code: string): void {
    for (const { call } of this.writers.splice(0)) this.outcomes[call] = code;
  }
}

type Timer = { delay: number; ring: () => void; holds: boolean };

/** A `Connection` on a stand-in for Bun's socket, which does what Bun's was seen to do. */
class Played extends Kernel {
  readonly data = new Connection(this as unknown as Socket<Connection>, 60);
  outcomes: string[] = [];
  shut = false;
  open = true;
  waits = 0;
  private paused = false;
  private short = false;
  private ended = false;
  private met = false;
  private readonly timers = new Set<Timer>();

  recv(maxLength: number): void {
    const shown = (bytes: Buffer) =>
      bytes.length === bytes.buffer.byteLength ? `${bytes}` || "end of stream" : "shared memory";
    this.note(this.data.recv(maxLength).then(shown));
  }
  sendAll(): void {
    this.note(this.data.sendAll("WXYZ").then(() => "sent"));
  }
  close(): void {
    this.data.close();
  }
  private note(outcome: Promise<string>): void {
    const call = this.outcomes.push("waits") - 1;
    const done = (text: string) => void (this.outcomes[call] = text);
    outcome.then(done, (error) => done(error.code ?? "refused"));
  }

  // What a connection calls of Bun
  readonly pause = () => void (this.paused = true);
  readonly resume = () => void (this.paused = false);
  readonly shutdown = () => void (this.shut = true);
  write(bytes: string | Uint8Array<ArrayBuffer>): number {
    this.met ||= this.rst;
    if (this.rst || this.shut) return -1;
    const taken = this.take(`${Buffer.from(bytes as string)}`);
    this.short = taken < bytes.length;
    return taken;
  }
  end(error?: Error): void {
    if (!this.open) return;
    this.open = false;
    this.tell("close", error);
  }
  readonly setTimeout = (ring: (...args: unknown[]) => void, delay: number, ...args: unknown[]) => {
    const timer = { delay, ring: () => ring(...args), holds: true };
    this.waits += delay === 60_000 ? 1 : 0;
    this.timers.add(timer);
    return Object.assign(timer, { unref: () => (timer.holds = false) });
  };
  readonly clearTimeout = (timer: Timer) => void this.timers.delete(timer);

  // What Bun does
  get waiting(): number {
    return [...this.timers].filter(({ holds }) => holds).length;
  }
  private tell(event: "data" | "drain" | "end" | "close", argument?: unknown): void {
    const handler = Connection.handlers[event] as (socket: unknown, argument: unknown) => void;
    handler(this, argument);
    drainMicrotasks();
  }
  private poll(): void {
    drainMicrotasks();
    if (this.open && this.short && this.room > 1 && !this.rst) {
      this.short = false;
      this.tell("drain");
    }
    // Before a reset it reads all that there is, although the socket may be paused.
    const reads = () => this.open && (!this.paused || (this.rst && !this.met));
    if (this.arrived !== "" && reads()) {
      const bytes = Buffer.from(this.arrived);
      this.arrived = "";
      this.tell("data", bytes);
    }
    if (this.arrived !== "" || !reads()) return;
    if ((this.fin || this.met) && !this.ended && !this.shut) {
      this.ended = true;
      this.tell("end");
    }
    const code = this.fin ? "EPIPE" : "ECONNRESET";
    if (this.rst) this.end(this.met ? undefined : Object.assign(new Error(code), { code }));
    else if (this.fin && this.shut) this.end();
  }
  private ring(time: number): void {
    drainMicrotasks();
    for (const timer of [...this.timers].filter(({ delay }) => delay <= time)) {
      this.timers.delete(timer);
      timer.ring();
      drainMicrotasks();
    }
  }
  turn(): void {
    this.poll();
    this.ring(0);
    this.poll();
  }
  minutePasses(): void {
    this.ring(60_000);
    this.turn();
    this.turn();
  }
}

describe("a connection does what a blocking socket does", () => {
  function* sequences(length: number): Generator<Move[]> {
    if (length === 0) return yield [];
    for (const moves of sequences(length - 1)) {
      const over = moves.includes("peerResets") ? 3 : moves.includes("peerEnds") ? 2 : 0;
      for (const move of Object.keys(MOVES).slice(over)) yield [...moves, move as Move];
    }
  }

  /** Makes the moves, with a turn after each whose bit is set in `turns`, and compares. */
  function play(moves: Move[], turns: number): void {
    const [played, model] = [new Played(), new Blocking()];
    setTimer.mockImplementation(played.setTimeout as unknown as typeof setTimeout);
    clearTimer.mockImplementation(played.clearTimeout as unknown as typeof clearTimeout);
    for (const [i, move] of moves.entries()) {
      MOVES[move](played);
      MOVES[move](model);
      if (!(turns & (1 << i))) continue;
      played.turn();
      model.turn();
      if (state(played) === state(model)) continue;
      const made = moves.map((move, j) => move + (turns & (1 << j) ? ";" : ",")).join(" ");
      expect(`${made} ${state(played)}`).toBe(`${made} ${state(model)}`);
    }
  }
  const state = (s: Played | Blocking) =>
    [s.outcomes, s.sent, s.shut, s.open, s.open && s.arrived, s.waits, s.waiting].join("|");

  const setTimer = spyOn(globalThis, "setTimeout");
  const clearTimer = spyOn(globalThis, "clearTimeout");
  afterAll(() => [setTimer, clearTimer].forEach((spy) => spy.mockRestore()));

  test("in every order of five events, each in a turn of its own", () => {
    for (const moves of sequences(5)) play(moves, 0b11111);
  });

  test("in every order of four events, whichever of them share a turn", () => {
    for (const moves of sequences(4)) for (let turns = 8; turns < 15; turns++) play(moves, turns);
  });
});

// ---- Real sockets -------------------------------------------------------------------------------

describe("a connection", () => {
  test("carries bytes of every kind, both ways at once, in messages of every size", async () => {
    const bytes = Buffer.from(Uint8Array.from({ length: 20 * MiB }, (_, i) => i % 251));
    const text = "€uro".repeat(MiB);
    const even = (below: number) => 2 * Math.floor(Math.random() * (below / 2));
    async function both(s: Connection): Promise<void> {
      const sent = [s.sendAll(text), s.sendAll("")];
      for (let start = 0, end; start < bytes.length; start = end) {
        end = Math.min(start + even(4 * MiB), bytes.length);
        const part = bytes.subarray(start, end);
        const wide = new Uint16Array(part.buffer, start, part.length / 2);
        const view = sent.length % 2 ? wide : new DataView(part.buffer, start, part.length);
        sent.push(s.sendAll(view));
      }
      const wanted = Buffer.concat([Buffer.from(text), bytes]);
      for (let start = 0, end; start < wanted.length; start = end) {
        end = Math.min(start + even(3 * MiB), wanted.length);
        const message = await recvAll(s, end - start);
        expect(message.equals(wanted.subarray(start, end))).toBeTrue();
      }
      await Promise.all(sent);
    }
    const served = Promise.withResolvers<void>();
    const serve = (sc: Connection) => both(sc).then(served.resolve, served.reject);
    using s = await connect(LOCALHOST, await serving(listen(LOCALHOST, 0, serve)));
    await Promise.all([both(s), served.promise]);
  });

  test("puts messages of many sizes together from pieces of many sizes", async () => {
    const sizes = [1, 2, 15, 0, 16, 17, 31, 100, 3];
    const stream = Buffer.from(Uint8Array.from({ length: 185 }, (_, i) => i));
    for (const size of [1, 2, 3, 5, 16, 33, 200]) {
      const [s, peer] = await pair();
      const messages: Buffer[] = [];
      const receiving = (async () => {
        for (const length of sizes) messages.push(await recvAll(s, length));
      })();
      for (let start = 0; start < stream.length; start += size) {
        await peer.deliver(stream.subarray(start, start + size));
      }
      await receiving;
      expect(messages.map(({ length }) => length)).toEqual(sizes);
      expect(Buffer.concat(messages)).toEqual(stream);
    }
  });

  test("leaves what nobody reads with the peer, and loses nothing of it", async () => {
    const [[unread, peer], [read, other]] = [await pair(), await pair()];
    const bytes = Buffer.alloc(64 * MiB, "0123456789abcde");
    peer.send(bytes);
    other.send(bytes);
    expect((await recvAll(read, bytes.length)).equals(bytes)).toBeTrue();
    expect(peer.socket.bytesWritten).toBeLessThan(bytes.length / 2);
    expect((await recvAll(unread, bytes.length)).equals(bytes)).toBeTrue();
  });

  test("gives what came before a reset, and then the error, again and again", async () => {
    const [s, peer] = await pair();
    await peer.deliver("ab", "cd");
    peer.send("ef"); // to a socket that is paused
    peer.socket.terminate();
    await once(events, "close");
    expect(`${await recvAll(s, 6)}`).toBe("abcdef");
    const error = { code: "ECONNRESET", message: "connection reset by peer" };
    await expect(s.recv(16)).rejects.toMatchObject(error);
    await expect(s.recv(16)).rejects.toMatchObject(error);
  });

  test("takes a reset that a write met for no end of the stream", async () => {
    const [s, peer] = await pair();
    peer.send("last");
    peer.socket.terminate();
    // Nothing is received before the next turn of the loop, so the write meets the reset.
    await expect(s.sendAll(HI)).rejects.toMatchObject({ code: "ECONNRESET" });
    expect(`${await s.recv(16)}`).toBe("last");
    await expect(s.recv(16)).rejects.toMatchObject({ code: "ECONNRESET" });
  });

  test("that this process cuts off has not ended either", async () => {
    const served = Promise.withResolvers<unknown>();
    const serve = (sc: Connection) => recvAll(sc, 16).then(() => {}, served.resolve);
    const peer = await Peer.dial(await serving(listen(LOCALHOST, 0, serve)));
    await peer.deliver("Hi ther");
    listeners.pop()?.stop(true);
    const error = { code: "ECONNABORTED", message: "the connection was cut off" };
    expect(await served.promise).toMatchObject(error);
  });

  test("brings what was sent although bytes are unread at the close", async () => {
    const [s, peer] = await pair();
    await peer.deliver("ab", "cd");
    peer.send("ef"); // which stays in the kernel
    expect(`${await s.recv(16)}`).toBe("abcd");
    peer.socket.pause();
    await s.sendAll(Buffer.alloc(200_000));
    s.close();
    const [other, another] = await pair();
    another.socket.end();
    expect(await other.recv(1)).toBeEmpty();
    peer.socket.resume();
    expect((await peer.all()).length).toBe(200_000);
    peer.socket.end();
    expect(await peer.closed.promise).toBe("in order");
  });

  test("is cut off 4 seconds after the close if the peer goes on sending", async () => {
    const [s, peer] = await pair();
    await peer.deliver(Buffer.alloc(17));
    await recvAll(s, 16);
    const timers = spyOn(globalThis, "setTimeout");
    s.close();
    const [cutOff, delay] = timers.mock.calls[0] ?? [];
    timers.mockRestore();
    await peer.deliver("?");
    expect(delay).toBe(4000);
    cutOff?.();
    peer.send("?");
    expect(await peer.closed.promise).toBe("by a reset");
  });

  test("holds its process until what was sent is with the peer, and no longer", async () => {
    const { port, peer } = peerListens();
    const code = `import { connect, recvAll } from "./tcp_local.ts";
      const s = await connect("${LOCALHOST}", ${port});
      await recvAll(s, 16);
      await s.sendAll(Buffer.alloc(2 ** 24));
      s.close();`;
    await using program = new Program("-e", code);
    (await peer).send(Buffer.alloc(17));
    expect((await (await peer).all()).length).toBe(2 ** 24);
    (await peer).socket.end();
    expect(await program.exited).toBe(0);
  }, 3500);

  test("refuses a second reader, however late in the tick, and the first gets all", async () => {
    for (let turns = 0; turns < 8; turns++) {
      const [s, peer] = await pair();
      await peer.deliver(HI.subarray(0, 10));
      const first = recvAll(s, 16);
      for (let turn = 0; turn < turns; turn++) await null;
      await expect(recvAll(s, 16)).rejects.toThrow("recv called while another recv is pending");
      peer.send(Buffer.concat([HI.subarray(10), BYE]));
      expect(await first).toEqual(HI);
      expect(await recvAll(s, 16)).toEqual(BYE);
    }
  });

  test("refuses to receive what is no number of bytes, and everything after a close", async () => {
    const [s] = await pair();
    for (const maxLength of [0, -1, 1.5, NaN]) {
      await expect(s.recv(maxLength)).rejects.toBeInstanceOf(RangeError);
    }
    s.close();
    for (const call of [s.recv(16), s.sendAll(HI), s.sendAll("")]) {
      const error = { code: "EBADF", message: "the connection is closed" };
      await expect(call).rejects.toMatchObject(error);
    }
  });
});

describe("a timeout", () => {
  test("lets go who sends nothing, or reads nothing, and keeps who waits for ever", async () => {
    const port = await serving(server(LOCALHOST, 0, 0.2));
    const stalled = [await Peer.dial(port), await Peer.dial(port)];
    stalled[1]?.send("Hi ");
    const [[patient, late], [quiet], [sending, deaf]] = [
      await pair(Infinity),
      await pair(0.2),
      await pair(0.2),
    ];
    const pending = patient.recv(16);
    deaf.socket.pause();
    const calls = [quiet.recv(16), sending.sendAll(Buffer.alloc(16 * MiB)), sending.sendAll("?")];
    const start = performance.now();
    for (const call of await Promise.allSettled(calls)) {
      expect(call).toMatchObject({ reason: { code: "ETIMEDOUT", message: "timed out" } });
    }
    expect(performance.now() - start).toBeWithin(190, 2000);
    expect(await Promise.all(stalled.map((peer) => peer.all()))).toEqual(["", ""]);
    const lines = stalled.map(({ name }) => `${name}: timed out`);
    expect((await take(err, 2)).toSorted()).toEqual(lines.toSorted());
    late.send("here");
    expect(`${await pending}`).toBe("here");
  });

  test("in the middle of a message takes what had come, and leaves what comes", async () => {
    const [s, peer] = await pair(0.1);
    await peer.deliver("Hi ");
    await expect(recvAll(s, 16)).rejects.toMatchObject({ code: "ETIMEDOUT" });
    peer.send("there");
    expect(`${await s.recv(16)}`).toBe("there");
  });

  test("does not count what came, to the FIN, while the process was busy", async () => {
    await using program = await Program.serving();
    using s = await connect(LOCALHOST, program.port, 0.1);
    await s.sendAll(HI);
    const [other, peer] = await pair();
    peer.send("?");
    const reply = recvAll(s, 16);
    // In the turn of another socket the timers are the first to be looked at.
    await other.recv(1);
    const start = performance.now();
    while (performance.now() - start < 300);
    expect(await reply).toEqual(BYE);
    expect(await s.recv(1)).toBeEmpty();
  });

  test("counts the look-up as connecting, and closes a connection that is made too late", async () => {
    const { port, peer } = peerListens();
    const answer = Promise.withResolvers<void>();
    const lookup = spyOn(Bun.dns, "lookup").mockImplementation(async () => {
      await answer.promise;
      return [{ address: LOCALHOST, family: 4, ttl: 0 }];
    });
    await expect(connect("name", port, 0.1)).rejects.toMatchObject({
      message: `cannot connect to ('name', ${port}): timed out`,
      code: "ETIMEDOUT",
    });
    answer.resolve();
    expect(await (await peer).all()).toBe("");
    lookup.mockRestore();
  });
});

describe("an error says in words", () => {
  test("why a name was not found", async () => {
    const lookup = spyOn(Bun.dns, "lookup");
    const code = (code: string) => () => Promise.reject(Object.assign(new Error("?"), { code }));
    for (const [answer, words] of [
      [code("DNS_ENOTFOUND"), "name or service not known"],
      [async () => [], "name or service not known"],
      [code("DNS_EAI_AGAIN"), "temporary failure in name resolution"],
      [code("DNS_EBADFAMILY"), "address family for hostname not supported"],
    ] as const) {
      lookup.mockImplementationOnce(answer).mockImplementationOnce(answer);
      const message = `cannot resolve "it's\\x1b[2J": ${words}`;
      await expect(connect("it's\x1b[2J")).rejects.toThrow(message);
      await expect(server("it's\x1b[2J")).rejects.toThrow(message);
    }
    lookup.mockRestore();
  });

  test("where it cannot connect or listen, and why", async () => {
    const [s] = await pair();
    const { port } = s.sockname; // which nobody listens on
    const taken = await serving();
    await expect(connect(LOCALHOST, port)).rejects.toMatchObject({
      message: `cannot connect to ('127.0.0.1', ${port}): connection refused or host unreachable`,
      code: "ECONNREFUSED",
    });
    await expect(server(LOCALHOST, taken)).rejects.toMatchObject({
      message: `cannot listen at ('127.0.0.1', ${taken}): address already in use`,
      code: "EADDRINUSE",
    });
    await expect(connect("", 65536)).rejects.toThrow("cannot connect to ('0.0.0.0', 65536): ");
    await expect(server("", -1)).rejects.toThrow("cannot listen at ('0.0.0.0', -1): ");
  });
});

describe("the server", () => {
  test("prints what the original does for each client, and replies", async () => {
    const port = await serving();
    const [odd, surplus] = ["it's \x1b[2J\0\n\\ 567", Buffer.alloc(70_000)];
    const lines = [`Listening at ('127.0.0.1', ${port})`];
    for (const pieces of [[HI], [odd], [Buffer.concat([HI, surplus])], [HI, "?", surplus]]) {
      const peer = await Peer.dial(port);
      for (const piece of pieces) peer.send(piece);
      if (pieces[0] === odd) peer.socket.shutdown();
      expect(await peer.all()).toBe("Farewell, client");
      peer.socket.end();
      expect(await peer.closed.promise).toBe("in order");
      const shown = pieces[0] === odd ? String.raw`"it's \x1b[2J\x00\n\\ 567"` : `'${HI}'`;
      lines.push(...transcript(LOCALHOST, port, peer.name, shown));
    }
    expect([out, err]).toEqual([lines, []]);
  });

  test("serves clients side by side", async () => {
    const port = await serving();
    const stalled = await Promise.all(Array.from({ length: 50 }, () => Peer.dial(port)));
    for (const peer of stalled) peer.send("Hi ");
    expect(await exchange(port)).toBe("Farewell, client");
    for (const peer of stalled) peer.send("there, server");
    for (const peer of stalled) expect(await peer.all()).toBe("Farewell, client");
  });

  test.each([0, 1, 15])("says which client ended after %p bytes", async (length) => {
    const port = await serving();
    const [ends, resets] = [await Peer.dial(port), await Peer.dial(port)];
    for (const peer of [ends, resets]) if (length > 0) await peer.deliver(HI.subarray(0, length));
    ends.socket.shutdown();
    expect(await ends.all()).toBe("");
    resets.socket.terminate();
    expect(await take(err, 2)).toEqual([
      `${ends.name}: socket closed ${length} bytes into a 16-byte message`,
      `${resets.name}: connection reset by peer`,
    ]);
    expect(await exchange(port)).toBe("Farewell, client");
  });

  test("says so when a client was gone before it had a name, and serves the next", async () => {
    const port = await serving();
    const code = `for (const _ of "123") (await Bun.connect({ hostname: "${LOCALHOST}", port: ${port},
      socket: { data() {} } })).terminate();`;
    // While this process waits for the other, it accepts nobody.
    Bun.spawnSync([process.execPath, "-e", code]);
    expect(await take(err, 3)).toEqual(Array(3).fill("a client: connection reset by peer"));
    expect(await exchange(port)).toBe("Farewell, client");
  });

  test("of one's own: what it throws is one line for its client, and the next is served", async () => {
    const errors = [new Error("in two\nlines"), "a string"];
    const serve = () => (errors.length > 0 ? Promise.reject(errors.shift()) : undefined);
    const port = await serving(listen(LOCALHOST, 0, serve));
    for (const why of ["in two lines", "a string", undefined]) {
      const peer = await Peer.dial(port);
      expect(await peer.all()).toBe("");
      expect(err.splice(0)).toEqual(why ? [`${peer.name}: ${why}`] : []);
    }
  });
});

describe("the client", () => {
  /** What it fails with, if it does, when its server does what `play` does. */
  async function against(play: (peer: Peer) => unknown): Promise<string | undefined> {
    const { port, peer } = peerListens();
    const outcome = client(LOCALHOST, port)
      .then(() => undefined)
      .catch((error) => error.message);
    await play(await peer);
    return await outcome;
  }

  test.each<[string, (peer: Peer) => unknown]>([
    ["a byte at a time", (peer) => peer.deliver(...`${BYE}`)],
    ["before it was asked for", (peer) => peer.send(BYE)],
    ["with a long tail", (peer) => peer.send(Buffer.concat([BYE, Buffer.alloc(4 * MiB)]))],
  ])("prints a reply that comes %s", async (_, play) => {
    expect(await against(play)).toBeUndefined();
    expect(out).toEqual([
      expect.stringMatching(/^Client has been assigned socket name \('127\.0\.0\.1', \d+\)$/),
      "The server said 'Farewell, client'",
    ]);
  });

  test.each([0, 15])("says that a server ended after %p bytes", async (length) => {
    const ended = await against((peer) => {
      peer.send(BYE.subarray(0, length));
      peer.socket.shutdown();
    });
    expect(ended).toBe(`socket closed ${length} bytes into a 16-byte message`);
    const reset = await against(async (peer) => {
      while (peer.received.length < 16) await once(events, "peer");
      peer.send(BYE.subarray(0, length));
      peer.socket.terminate();
    });
    expect(reset).toBe("connection reset by peer");
    expect(out.filter((line) => line.includes("said"))).toEqual([]);
  });
});

describe("the command line", () => {
  const USAGE = "usage: tcp_local.ts server|client [host]\n";

  test.each([
    [[], "127.0.0.1"],
    [["localhost"], "127.0.0.1"],
    [["127.1"], "127.0.0.1"],
    [["0x7f000001"], "127.0.0.1"],
    [["127.0.0.010"], "127.0.0.8"],
    [[""], "0.0.0.0"],
  ])("takes %j for the host %p", async (args, hostname) => {
    const listener = await server(LOCALHOST, 0);
    listeners.push(listener);
    const listening = spyOn(Bun, "listen").mockReturnValue(listener as never);
    const [dial, here] = [Bun.connect<Connection>, { hostname: LOCALHOST, port: listener.port }];
    const connecting = spyOn(Bun, "connect");
    connecting.mockImplementation((options) => dial({ ...options, ...here } as never) as never);
    void main(["server", ...args]);
    expect(await main(["client", ...args])).toBe(0);
    for (const spy of [listening, connecting]) {
      expect(spy.mock.calls[0]?.[0]).toMatchObject({ hostname, port: PORT });
      spy.mockRestore();
    }
    expect(await take(out, 8)).toContain("The server said 'Farewell, client'");
  });

  test("takes everything but server and client, and a host, for a wrong usage", async () => {
    const wrong = ["", ",", "foo", "foo,bar", "127.0.0.1", "Server", "--help", "server,x,y"];
    for (const args of wrong) expect(await main(args.split(","))).toBe(2);
    expect(err.splice(0)).toEqual(wrong.flatMap(() => USAGE.split("\n")[0]));
    expect(await Program.run()).toEqual({ status: 2, out: "", err: USAGE });
  });

  test("says in one line why it failed", async () => {
    const error = "tcp_local.ts: cannot listen at ('192.0.2.1', 1060): address not available\n";
    expect(await Program.run("server", "192.0.2.1")).toEqual({ status: 1, out: "", err: error });
  });

  const isFree = (hostname: string): boolean => {
    try {
      Bun.listen({ hostname, port: PORT, socket: { data() {} } }).stop(true);
      return true;
    } catch {
      return false;
    }
  };
  const host = [`127.0.1.${Math.ceil(Math.random() * 250)}`, LOCALHOST].find(isFree) ?? "";
  describe.skipIf(!host)(`on port 1060${host ? "" : ", which another program holds,"}`, () => {
    test("both sides print what the original does, and a second server is refused", async () => {
      await using program = new Program("tcp_local.ts", "server", host);
      let expected = `Listening at ('${host}', 1060)\n`;
      await program.until(({ out }) => out === expected);
      for (let round = 0; round < 2; round++) {
        const { status, out, err } = await Program.run("client", host);
        const name = /\(.*\)/.exec(out)?.[0] ?? "";
        expect({ status, out, err }).toEqual({
          status: 0,
          out: `Client has been assigned socket name ${name}\nThe server said 'Farewell, client'\n`,
          err: "",
        });
        expect(name).toMatch(/^\('127\.0\.0\.1', \d+\)$/);
        expected += transcript(host, PORT, name, "'Hi there, server'").join("\n") + "\n";
        await program.until(({ out }) => out.length >= expected.length);
        expect(program.out).toBe(expected);
      }
      const late = `tcp_local.ts: cannot listen at ('${host}', 1060): address already in use\n`;
      expect(await Program.run("server", host)).toEqual({ status: 1, out: "", err: late });
    });

    test("a signal ends a server at once and quietly, and it starts again", async () => {
      for (const signal of ["SIGINT", "SIGTERM"] as const) {
        await using program = new Program("tcp_local.ts", "server", host);
        await program.until(({ out, err }) => (out + err).endsWith("\n"));
        expect(await exchange(PORT, HI, host)).toBe("Farewell, client");
        await Peer.dial(PORT, host);
        program.process.kill(signal);
        await program.exited;
        expect(program.err).toBe("");
      }
    });
  });

  test("a server whose standard output is closed goes on", async () => {
    await using program = await Program.serving(true);
    for (let round = 0; round < 3; round++) {
      expect(await exchange(program.port)).toBe("Farewell, client");
    }
    expect(program.err).toBe("");
  });
});

const readme = await Bun.file(`${import.meta.dir}/README.md`).text();
const [asking, echoing] = readme.match(/(?<=```ts\n)import .*?(?=```)/gs) ?? [];

describe("the README", () => {
  test("has a client that talks to the server", async () => {
    const script = `${asking}`.replace("1060", `${await serving()}`);
    await using program = new Program("-e", script);
    expect([await program.exited, program.out, program.err]).toEqual([0, "Farewell, client\n", ""]);
  });

  test("has a server for messages with their length in front", async () => {
    const script = `${echoing}console.log(port)`.replace("1061", "0");
    await using program = new Program("-e", script.replace("await", "const { port } = await"));
    await program.until(({ out }) => out.endsWith("\n"));
    const port = Number(program.out);
    const peer = await Peer.dial(port);
    const messages = "\0\0\0\x05first\0\0\0\x06second";
    peer.send(messages);
    peer.socket.shutdown();
    expect(await peer.all()).toBe(messages);
    const greedy = await Peer.dial(port);
    greedy.send("\0\x01\0\x01");
    expect(await greedy.all()).toBe("");
    const line = `${greedy.name}: a message of 65537 bytes is too long\n`;
    await program.until(({ err }) => err === line);
  });
});

// What a process holds is read from /proc.
describe.skipIf(!existsSync("/proc/self/fd"))("under load, a server", () => {
  const descriptors = ({ process: { pid } }: Program) => readdirSync(`/proc/${pid}/fd`).length;

  /** The most memory that it has held so far, in bytes. */
  async function peakMemory({ process: { pid } }: Program): Promise<number> {
    const status = await Bun.file(`/proc/${pid}/status`).text();
    return Number(/VmHWM:\s+(\d+) kB/.exec(status)?.[1]) * 1024;
  }

  test.each([
    ["a message", HI],
    ["a message and a surplus", Buffer.alloc(17)],
    ["all but the last byte of a message", HI.subarray(0, 15)],
  ])("keeps 256 MiB behind %s out of memory", async (_, start) => {
    await using program = await Program.serving();
    await exchange(program.port);
    const before = await peakMemory(program);
    const peer = await Peer.dial(program.port);
    peer.send(start);
    peer.send(Buffer.alloc(256 * MiB));
    expect(await peer.all()).toBe("Farewell, client");
    while (peer.unsent.length > 0) await once(events, "peer");
    expect(await exchange(program.port)).toBe("Farewell, client");
    expect(await peakMemory(program)).toBeLessThan(before + 64 * MiB);
  });

  test("holds nothing of clients that reset, and little of clients that stall", async () => {
    await using program = await Program.serving();
    const { port } = program;
    await exchange(port);
    const [memory, fds] = [await peakMemory(program), descriptors(program)];
    for (let i = 0; i < 200; i++) {
      const peer = await Peer.dial(port);
      peer.send(HI.subarray(0, i % 17));
      if (i % 3 === 0) await exchange(port);
      peer.socket.terminate();
    }
    const peers = await Promise.all(Array.from({ length: 500 }, () => Peer.dial(port)));
    for (const peer of peers) peer.send("Hi ther");
    expect(await exchange(port)).toBe("Farewell, client");
    for (const peer of peers.slice(250)) peer.send("e, server");
    for (const peer of peers.slice(250)) expect(await peer.all()).toBe("Farewell, client");
    for (const peer of peers) peer.socket.end();
    do expect(await exchange(port)).toBe("Farewell, client");
    while (descriptors(program) > fds);
    expect(await peakMemory(program)).toBeLessThan(memory + 32 * MiB);
    const text = `${program.out}${program.err}`.replaceAll(/\('127.0.0.1', \d+\)|a client/g, "*");
    expect([...new Set(text.trim().split("\n"))].toSorted()).toEqual([
      "*: connection reset by peer",
      "*: socket closed 7 bytes into a 16-byte message",
      "Listening at *",
      "Reply sent, socket closed",
      "Socket connects * and *",
      "The incoming sixteen-octet message says 'Hi there, server'",
      "We have accepted a connection from *",
    ]);
  });
});
