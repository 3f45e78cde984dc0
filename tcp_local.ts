#!/usr/bin/env bun
/**
 * The classic sixteen-octet TCP server and client, for Bun.
 *
 *     bun tcp_local.ts server
 *     bun tcp_local.ts client 127.0.0.1
 *
 * TCP carries a stream of octets and knows no messages: what one side sends in one piece may arrive
 * in many, and many pieces in one. In Python a loop around the blocking `recv` puts a message
 * together. Bun pushes each piece at a `data` handler instead. `Connection` makes a `recv` of that
 * again, one to await, and `recvAll` is the same loop as ever.
 */
import type { Socket, SocketHandler, TCPSocketListener } from "bun";

/** The port of the original. */
export const PORT = 1060;

/** Seconds that one wait for the peer may last. */
const TIMEOUT = 60;

/** Seconds that a closed connection goes on taking what its peer still sends. */
const LINGER = 4;

/** Octets that TCP sends at once, before it hears from the peer (RFC 6928). */
const INITIAL_WINDOW = 14_600;

const NOTHING = Buffer.alloc(0);

/** What went wrong, for the codes that Bun has no words for, or others. */
const WORDS: Record<string, string> = {
  DNS_EBADFAMILY: "address family for hostname not supported",
  DNS_ENOTFOUND: "name or service not known",
  EACCES: "permission denied",
  EADDRINUSE: "address already in use",
  EADDRNOTAVAIL: "cannot assign requested address",
  EBADF: "the connection is closed",
  ECONNREFUSED: "connection refused or host unreachable", // Bun has this one code for both
  ECONNRESET: "connection reset by peer",
  EHOSTUNREACH: "no route to host",
  EPIPE: "connection reset by peer",
  ETIMEDOUT: "timed out",
};

function socketError(code: string): Error {
  return Object.assign(new Error(WORDS[code]), { code });
}

function inWords(error: Error): string {
  return ("code" in error && WORDS[String(error.code)]) || error.message;
}

/** Returns `error` with a message that says what happened to `subject`, in words. */
function explain(error: unknown, subject: unknown): Error {
  if (!(error instanceof Error)) return new Error(`${subject}: ${error}`);
  error.message = `${subject}: ${inWords(error)}`;
  return error;
}

/** `seconds` in milliseconds, as far as `setTimeout` takes them. */
function toDelay(seconds: number): number {
  return Math.min(seconds * 1000, 2 ** 31 - 1);
}

/** The name of one end of a connection; as a string, the tuple that Python prints. */
class SocketName {
  constructor(
    readonly host: string,
    readonly port: number,
  ) {}

  toString(): string {
    return `('${this.host}', ${this.port})`;
  }
}

/**
 * A TCP connection with the face of a blocking socket: `await` it where Python blocks.
 *
 * Every wait for the peer is bounded, as by Python's `settimeout`: it rejects with `timed out`
 * (`ETIMEDOUT`) when `timeout` seconds went by without an octet. If the connection breaks, it
 * rejects with the error of the socket, such as `ECONNRESET`; once it is closed, with `EBADF`.
 */
export class Connection {
  /** One set for the sockets of `connect` and of `server`, whose state is in `socket.data`. */
  static readonly handlers: SocketHandler<Connection | undefined> = {
    data: (socket, octets) => socket.data?.received(octets),
    drain: (socket) => socket.data?.drained(),
    end: (socket) => socket.data?.ended(),
    close: (socket, error) => socket.data?.ended(error),
  };

  /** Gives an open socket its connection, unless its peer has reset it already. */
  static over(socket: Socket<Connection | undefined>, timeout: number): Connection | undefined {
    const sockname = new SocketName(socket.localAddress, socket.localPort);
    const peername = new SocketName(socket.remoteAddress, socket.remotePort);
    // From a reset on, which can come at any time, these are undefined, whatever the types say.
    if (peername.port === undefined) return undefined;
    return (socket.data = new Connection(socket, toDelay(timeout), sockname, peername));
  }

  private unread: Buffer = NOTHING;
  private reader?: {
    maxLength: number;
    resolve(octets: Buffer): void;
    reject(error: Error): void;
    timer?: Timer;
  };
  private writer?: PromiseWithResolvers<void>;
  /** Octets handed to the kernel. */
  private sent = 0;
  private atEnd = false;
  private error?: Error;
  private closed = false;

  private constructor(
    private readonly socket: Socket<Connection | undefined>,
    private readonly delay: number,
    readonly sockname: SocketName,
    readonly peername: SocketName,
  ) {}

  /**
   * Resolves to 1 to `maxLength` octets as soon as there are any, and to none at the end of the
   * stream. An error of the socket rejects it after the octets that came before were read.
   *
   * While one `recv` is pending, a second rejects with an `Error`, and the first goes on.
   */
  recv(maxLength: number): Promise<Buffer> {
    const { promise, resolve, reject } = Promise.withResolvers<Buffer>();
    if (this.reader) {
      reject(new Error("recv called while another recv is pending"));
    } else if (!Number.isInteger(maxLength) || maxLength < 1) {
      reject(new RangeError(`recv takes 1 octet or more, not ${maxLength}`));
    } else {
      this.reader = { maxLength, resolve, reject };
      this.read();
    }
    return promise;
  }

  /**
   * Resolves when every octet of `data` is handed to the kernel; a string is sent as UTF-8.
   *
   * Calls take turns, in their order. After one that rejects, nobody knows how much was sent.
   */
  async sendAll(data: string | Uint8Array): Promise<void> {
    while (this.writer) await this.writer.promise;
    for (let unsent = data; ;) {
      if (this.closed) throw socketError("EBADF");
      const sent = this.socket.write(unsent);
      if (sent < 0) throw this.error ?? socketError("ECONNRESET");
      this.sent += sent;
      if (sent === Buffer.byteLength(unsent)) return;
      unsent = (typeof unsent === "string" ? Buffer.from(unsent) : unsent).subarray(sent);
      const { promise, reject } = (this.writer = Promise.withResolvers());
      const timer = setTimeout(() => reject(socketError("ETIMEDOUT")), this.delay);
      try {
        await promise;
      } finally {
        this.writer = undefined;
        clearTimeout(timer);
      }
    }
  }

  /** Closes the connection. What was sent still goes out; what was not read is lost. */
  close(): void {
    if (this.closed) return;
    this.closed = true;
    // The FIN goes first: should the kernel have octets that nobody reads, its reset comes behind.
    this.socket.shutdown();
    if (this.unread.length === 0 && this.sent <= INITIAL_WINDOW) this.socket.end();
    else this.linger();
    this.unread = NOTHING;
    this.read();
    this.writer?.resolve();
  }

  /**
   * Discards what still comes, until the peer closes too. To close a socket with octets unread is
   * to reset the connection: the kernel drops what it has not sent, and can overtake what it has.
   */
  private linger(): void {
    this.socket.resume();
    setTimeout(() => this.socket.end(), LINGER * 1000).unref();
  }

  private received(octets: Buffer): void {
    if (this.closed) return;
    if (this.unread.length === 0) {
      this.unread = octets;
    } else {
      // Nobody has read the last piece yet: let what follows wait in the kernel.
      this.unread = Buffer.concat([this.unread, octets]);
      this.socket.pause();
    }
    this.read();
  }

  private ended(error?: Error): void {
    if (error && !this.atEnd) {
      error.message = inWords(error);
      this.error = error;
    } else {
      this.atEnd = true;
    }
    this.read();
    this.writer?.resolve();
  }

  private drained(): void {
    this.writer?.resolve();
  }

  /** Settles the pending `recv`, if there is one, with what there is by now. */
  private read(): void {
    const reader = this.reader;
    if (!reader) return;
    if (this.unread.length > 0) {
      reader.resolve(this.take(reader.maxLength));
    } else if (this.closed) {
      reader.reject(socketError("EBADF"));
    } else if (this.error) {
      reader.reject(this.error);
    } else if (this.atEnd) {
      reader.resolve(NOTHING);
    } else {
      this.socket.resume();
      reader.timer = setTimeout(() => {
        this.reader = undefined;
        reader.reject(socketError("ETIMEDOUT"));
      }, this.delay);
      return;
    }
    this.reader = undefined;
    clearTimeout(reader.timer);
  }

  private take(maxLength: number): Buffer {
    const octets = this.unread;
    this.unread = octets.length > maxLength ? octets.subarray(maxLength) : NOTHING;
    return octets.length > maxLength ? octets.subarray(0, maxLength) : octets;
  }
}

/**
 * Connects to a TCP server, as Python's `socket.create_connection` does, but over IPv4 only.
 * Rejects if the name does not resolve, or if no connection is made within `timeout` seconds. Bun
 * has no way to stop trying, though: the process may live on until the kernel gives up.
 */
export async function connect(host: string, port = PORT, timeout = TIMEOUT): Promise<Connection> {
  const hostname = IPV4_ADDRESS.test(host) ? host : await getaddrinfo(host);
  const { promise, resolve, reject } = Promise.withResolvers<Connection | undefined>();
  const timer = setTimeout(() => reject(socketError("ETIMEDOUT")), toDelay(timeout));
  try {
    Bun.connect<Connection | undefined>({
      hostname,
      port,
      allowHalfOpen: true,
      socket: {
        ...Connection.handlers,
        open(socket) {
          resolve(Connection.over(socket, timeout));
          // Nobody waits any more for a connection that is made too late.
          promise.catch(() => socket.end());
        },
      },
    }).catch(reject);
    const connection = await promise;
    if (!connection) throw socketError("ECONNRESET");
    return connection;
  } catch (error) {
    throw explain(error, `cannot connect to ${new SocketName(hostname, port)}`);
  } finally {
    clearTimeout(timer);
  }
}

/** A literal address, which needs no look-up. */
const IPV4_ADDRESS = /^((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(\.(?!$)|$)){4}$/;

/** The first IPv4 address that getaddrinfo(3) finds; '' is every interface, as in Python. */
async function getaddrinfo(host: string): Promise<string> {
  if (host === "") return "0.0.0.0";
  try {
    const [first] = await Bun.dns.lookup(host, { family: 4, backend: "system" });
    return first.address;
  } catch (error) {
    throw explain(error, `cannot resolve ${repr(Buffer.from(host))}`);
  }
}

/** The stream ended before the message did: `partial` is what came, of `expected` octets. */
export class EOFError extends Error {
  override readonly name = "EOFError";

  constructor(
    readonly partial: Buffer,
    readonly expected: number,
  ) {
    super(`socket closed ${partial.length} bytes into a ${expected}-byte message`);
  }
}

/**
 * Receives exactly `length` octets, into a buffer that is the caller's own. What follows them stays
 * for the next `recv`, of which this never asks for more than is missing.
 *
 * Rejects with an `EOFError` if the stream ends before, with a `RangeError` if `length` is negative
 * or not whole, and with what `recv` rejects with.
 */
export async function recvAll(
  sock: { recv(maxLength: number): Promise<Uint8Array> },
  length: number,
): Promise<Buffer> {
  if (!Number.isInteger(length) || length < 0) {
    throw new RangeError(`recvAll takes 0 octets or more, not ${length}`);
  }
  const data = Buffer.alloc(length);
  let received = 0;
  while (received < length) {
    const more = await sock.recv(length - received);
    if (more.length === 0) throw new EOFError(data.subarray(0, received), length);
    data.set(more, received);
    received += more.length;
  }
  return data;
}

const ESCAPES: Record<string, string> = { "\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\" };

/** What Python 2's `repr` shows of a byte string: printable ASCII, whatever the octets. */
export function repr(bytes: Uint8Array): string {
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString("latin1");
  const shown = text.replace(
    /[^ -~]|\\/g,
    (octet) => ESCAPES[octet] ?? `\\x${octet.charCodeAt(0).toString(16).padStart(2, "0")}`,
  );
  if (!text.includes("'")) return `'${shown}'`;
  return text.includes('"') ? `'${shown.replaceAll("'", "\\'")}'` : `"${shown}"`;
}

/**
 * Listens at `host`, serves every client that comes, side by side, and prints what the original
 * does. Resolves to the listener, once bound; port 0 is a free one. Rejects if it cannot be bound.
 */
export async function server(
  host: string,
  port = PORT,
  timeout = TIMEOUT,
): Promise<TCPSocketListener<Connection | undefined>> {
  const hostname = IPV4_ADDRESS.test(host) ? host : await getaddrinfo(host);
  let listener: TCPSocketListener<Connection | undefined>;
  try {
    listener = Bun.listen<Connection | undefined>({
      hostname,
      port,
      allowHalfOpen: true,
      socket: {
        ...Connection.handlers,
        open(socket) {
          const sc = Connection.over(socket, timeout);
          if (sc) serve(sc);
          else console.error("a client: connection reset by peer");
        },
      },
    });
  } catch (error) {
    throw explain(error, `cannot listen at ${new SocketName(hostname, port)}`);
  }
  const sockname = new SocketName(hostname, listener.port);
  console.log(`Listening at ${sockname}`);
  return listener;

  async function serve(sc: Connection): Promise<void> {
    const peername = `${sc.peername}`;
    try {
      console.log(
        `We have accepted a connection from ${peername}\nSocket connects ${sc.sockname} and ${peername}`,
      );
      const message = await recvAll(sc, 16);
      console.log(`The incoming sixteen-octet message says ${repr(message)}`);
      await sc.sendAll("Farewell, client");
      sc.close();
      console.log(`Reply sent, socket closed\nListening at ${sockname}`);
    } catch (error) {
      console.error(explain(error, peername).message);
      sc.close();
    }
  }
}

/** Has one exchange with the server at `host`, and prints what the original does. */
export async function client(host: string, port = PORT, timeout = TIMEOUT): Promise<void> {
  const s = await connect(host, port, timeout);
  try {
    console.log(`Client has been assigned socket name ${s.sockname}`);
    await s.sendAll("Hi there, server");
    const reply = await recvAll(s, 16);
    console.log(`The server said ${repr(reply)}`);
  } catch (error) {
    throw explain(error, s.peername);
  } finally {
    s.close();
  }
}

function forever(): Promise<never> {
  return new Promise(() => {});
}

/**
 * Does what the command line says, `args` being what follows the name of the script. Resolves to
 * the exit status: 0, 1 after an error, 2 after wrong usage. A server runs until a signal ends it.
 */
export async function main(args: string[]): Promise<number> {
  const [mode, host = "127.0.0.1"] = args;
  if (args.length > 2 || (mode !== "server" && mode !== "client")) {
    console.error("usage: tcp_local.ts server|client [host]");
    return 2;
  }
  try {
    await (mode === "server" ? server(host).then(forever) : client(host));
    return 0;
  } catch (error) {
    console.error(`tcp_local.ts: ${error instanceof Error ? error.message : error}`);
    return 1;
  }
}

if (import.meta.main) process.exit(await main(Bun.argv.slice(2)));
